"""Runs the commands on folders, in processes of their own, and judges how each ended."""

from __future__ import annotations

import gc
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.hostile_folders.folders import FAMILIES, make_folder
from tests.hostile_folders.nodes import SECRET

MAX_SECONDS = 60
MAX_BYTES = 4 << 30
BATCH = 50
COMMANDS = ("plan", "bake", "build")
RECIPE = """model: {model}
layers: [2]
k: 1
prompts:
  target: {{path: ../target.txt}}
  neutral: {{path: ../neutral.txt}}
rollouts: {{max_new_tokens: 2}}
"""
THINGS = ("river", "bridge", "wall", "square", "port", "tower", "gate", "market")


@dataclass(frozen=True)
class Outcome:
    """How one command took one folder; `fault` is empty where it behaved.

    Attributes:
        number: of the folder.
        what: what is wrong with it.
        command: one of `COMMANDS`.
        code: exit code.
        fault: kind of misbehaviour, if any.
        said: the last line of the error.
        seconds: wall time.
        peak: bytes of resident memory at most.
    """

    number: int
    what: str
    command: str
    code: int
    fault: str
    said: str
    seconds: float
    peak: int


def make_sound(place: Path) -> dict[str, Path]:
    """The models that load, by family, with what every folder's build needs beside them."""
    import torch
    from safetensors.torch import save_file

    from tests.helpers.tiny import D_MODEL, save_tiny, train_tokenizer

    tokenizer = train_tokenizer()
    found = {}
    for family in FAMILIES:
        kind, size = ("llama", "30KB") if family == "sharded" else (family, "1GB")
        found[family] = save_tiny(
            kind, place / family, tokenizer, dtype=torch.bfloat16, shard_size=size
        )
    (place / "target.txt").write_text("\n".join(f"Where is the old {x}?" for x in THINGS))
    (place / "neutral.txt").write_text("\n".join(f"What is a {x}?" for x in THINGS))
    torch.manual_seed(0)
    save_file({"subspace": torch.randn(D_MODEL, 1)}, place / "q.safetensors")
    return found


def arguments(command: str, place: Path) -> list[str]:
    """The command line, in the folder `place` that holds `model`."""
    if command == "plan":
        return ["plan", str(place / "model"), "--out", str(place / "out")]
    if command == "bake":
        own = ["--model", str(place / "model"), "--subspace", str(place.parent / "q.safetensors")]
        return ["bake", *own, "--out", str(place / "out")]
    return ["build", str(place / "r.yaml"), "--out", str(place / "out"), "--device", "cpu"]


_ERROR = re.compile(r"(\w+): \S")


def judge(command: str, code: int, error: BaseException | None, stderr: str, out: Path) -> str:
    """The kind of misbehaviour, or nothing."""
    import abliterator.errors

    if error is not None and not isinstance(error, SystemExit):
        return f"traceback: {type(error).__module__}.{type(error).__name__}"
    if code not in (0, 1) or "Traceback" in stderr:
        return f"exit code {code}"
    if code == 1:
        last = stderr.rstrip("\n").rsplit("\n", 1)[-1]
        match = _ERROR.match(last)
        if match is None or not hasattr(abliterator.errors, match[1]):
            return "no named error on the last line"
        if not last.isprintable():
            return "an error that is not printable"
        if out.exists():
            return "partial output"
    elif command != "plan":
        checkpoint = out if command == "bake" else out / "checkpoint"
        whole = "abliterator/edits.json" if command == "bake" else "abliterator/record.json"
        if not (checkpoint / whole).is_file():
            return "partial output"
        if any(SECRET.encode() in p.read_bytes() for p in checkpoint.rglob("*") if p.is_file()):
            return "a private file was copied"
    return ""


def run_command(command: str, number: int, what: str, place: Path) -> Outcome:
    """Runs one command in this process."""
    import traceback

    from click.testing import CliRunner

    from abliterator.cli import main

    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew
    start, out = time.monotonic(), place / "out"
    done = CliRunner().invoke(main, arguments(command, place))
    seconds = time.monotonic() - start
    fault = judge(command, done.exit_code, done.exception, done.stderr, out)
    said = done.stderr.rstrip("\n").rsplit("\n", 1)[-1]
    if fault.startswith("traceback") and done.exc_info is not None:
        lines = traceback.format_exception(*done.exc_info)
        said = "".join(lines)[-2500:]
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10  # type: ignore[index]
    if not fault and peak > MAX_BYTES:
        fault = "memory"
    shutil.rmtree(out, ignore_errors=True)
    return Outcome(number, what, command, done.exit_code, fault, said, round(seconds, 2), peak)


def run_batch(seed: int, numbers: list[int], place: Path, log: Path) -> None:
    """The child: folders one after another; before and after each command, a line in `log`."""
    importlib.import_module("transformers.models.llama.modeling_llama")
    gc.collect()
    gc.freeze()  # a build collects garbage several times, and passes over what was imported
    sound = {family: place / family for family in FAMILIES}
    os.chdir(place)
    with log.open("a", encoding="utf-8") as lines:
        for number in numbers:
            own = place / f"folder{number}"
            shutil.rmtree(own, ignore_errors=True)
            own.mkdir()
            _, what = make_folder(seed, number, sound, own)
            (own / "r.yaml").write_text(RECIPE.format(model=json.dumps(str(own / "model"))))
            for command in COMMANDS:
                print(json.dumps([number, what, command]), file=lines, flush=True)
                print(
                    json.dumps(asdict(run_command(command, number, what, own))),
                    file=lines,
                    flush=True,
                )
            shutil.rmtree(own, ignore_errors=True)


def child(seed: int, numbers: list[int], place: Path) -> list[Outcome]:
    """Runs folders in a process of their own; the last line names whoever ends or hangs it."""
    log = place / "log.jsonl"
    log.unlink(missing_ok=True)
    log.touch()
    job = [str(seed), ",".join(map(str, numbers)), str(place), str(log)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"OMP_NUM_THREADS": "1", "ABLITERATOR_CACHE": str(place / "cache")}
    environment |= {"HF_MODULES_CACHE": str(place / "modules"), "PYTHONWARNINGS": "ignore"}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.hostile_folders", "--job", *job],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    ) as process:
        ended = _watch(process, log)
        said = (process.stderr.read() if process.stderr else b"").decode("utf-8", "replace")[-500:]
    lines = [json.loads(line) for line in log.read_text("utf-8").split("\n") if line]
    found = [Outcome(**line) for line in lines if isinstance(line, dict)]
    if lines and isinstance(lines[-1], list):
        number, what, command = lines[-1]
        found.append(Outcome(number, what, command, -1, ended or "the process died", said, 0, 0))
    elif process.returncode != 0 and not ended:
        raise RuntimeError(f"the batch itself failed: {said}")
    return found


def _watch(process: subprocess.Popen[bytes], log: Path) -> str:
    """Waits for the process; ends it, and says why, when a command takes too long or too much."""
    size, since = -1, time.monotonic()
    while process.poll() is None:
        time.sleep(0.05)
        if (now := log.stat().st_size) != size:
            size, since = now, time.monotonic()
        allowed = MAX_SECONDS + (120 if size == 0 else 0)  # torch is imported before the first
        try:
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            pages = 0
        too_much = pages * os.sysconf("SC_PAGE_SIZE") > MAX_BYTES
        if too_much or time.monotonic() - since > allowed:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return "memory" if too_much else "hang"
    return ""


def run_all(
    seed: int, numbers: list[int], place: Path, tell: Callable[[Outcome], None]
) -> list[Outcome]:
    """All folders, in batches; a batch that was ended goes on after the folder that ended it."""
    found: list[Outcome] = []
    rest = list(numbers)
    while rest:
        batch, rest = rest[:BATCH], rest[BATCH:]
        outcomes = child(seed, batch, place)
        if not outcomes:
            raise RuntimeError(f"The child for folders {batch[0]} to {batch[-1]} did not start.")
        for outcome in outcomes:
            tell(outcome)
        found += outcomes
        reached = max(outcome.number for outcome in outcomes)
        rest = [number for number in batch if number > reached] + rest
    return found
