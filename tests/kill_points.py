"""Kill a run at each of its file operations, give the same command again, compare what it leaves.

    python -m tests.kill_points                 # every point: 15 to 60 minutes
    python -m tests.kill_points build --every 10
    python -m tests.kill_points --windows       # under its rules for files
    python -m tests.kill_points build:40 bake:10     # every 40th, every 10th

A point lies before each opening for writing, rename, removal, mkdir, fsync and copy of a range, and
in the middle of each write, of files below the scenario's folder. A child process ends itself there
with SIGKILL; a second one sees what is left (`publish --dry-run` must refuse it, or find a whole
checkpoint of the old or of the new recipe) and gives the command again. Its checkpoint must be that
of an undisturbed run to the last bit, but for the times in the record.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # this process forks: torch must have made no threads in it
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from safetensors.torch import save_file

from abliterator import pipeline
from abliterator.card import render_adapter_card, render_card
from abliterator.errors import AbliteratorError
from abliterator.pipeline import Options
from abliterator.publish import Target, plan_adapter, plan_publish
from abliterator.recipe import load_recipe
from abliterator.record import RunRecord
from tests.bake.seams import bake_in_threads
from tests.helpers.tiny import save_tiny, train_tokenizer
from tests.helpers.windows_rules import package_modules, windows_rules

RECIPE = """
model: {model}
layers: [2]
k: 1
prompts: {{target: {{path: t.txt}}, neutral: {{path: n.txt}}}}
edit: {{output: both}}
rollouts: {{max_new_tokens: 2}}
divergence: {{limit: 2, tokens: 2}}
"""
RECORD = "checkpoint/abliterator/record.json"
CARDS = {"checkpoint/README.md": render_card, "adapter/README.md": render_adapter_card}
# By audit event: which of its arguments are paths.
EVENTS = {"os.rename": (0, 1), "os.remove": (0,), "os.mkdir": (0,), "os.rmdir": (0,)}


class Points:
    """Counts the file operations of this process below a folder, and ends it at one of them."""

    def __init__(self, folder: Path, kill_at: int | None) -> None:
        self._folder, self._kill_at = str(folder), kill_at
        self._counting = threading.Lock()
        self.passed = 0

    def point(self) -> None:
        """One more."""
        with self._counting:
            self.passed += 1
            last = self.passed == self._kill_at
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """From here on; a process cannot take it back."""
        sys.addaudithook(self._heard)
        for name in ("fsync", "copy_file_range"):
            setattr(os, name, self._before(getattr(os, name)))
        from abliterator.files import write_fully as whole

        def write_in_two(out: Any, data: memoryview) -> None:
            data = memoryview(data).cast("B")
            whole(out, data[: len(data) // 2])
            self.point()
            whole(out, data[len(data) // 2 :])

        for module in [m for name, m in sys.modules.items() if name.startswith("abliterator")]:
            if getattr(module, "write_fully", None) is whole:
                module.write_fully = write_in_two  # type: ignore[attr-defined]

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = bool(set(mode or "") & set("wax+")) or flags & (os.O_WRONLY | os.O_RDWR)
            if writes and self._is_here(path):
                self.point()
        elif event in EVENTS:
            # shutil.rmtree removes by names relative to an open folder
            relative = event in ("os.remove", "os.rmdir") and arguments[-1] != -1
            if relative or any(self._is_here(arguments[i]) for i in EVENTS[event]):
                self.point()

    def _is_here(self, path: object) -> bool:
        return isinstance(path, (str, os.PathLike)) and str(path).startswith(self._folder)

    def _before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.point()
            return function(*arguments)

        return call


class Ended(NamedTuple):
    """How a child ended: what it said, and by which signal or exit status."""

    said: Any
    status: int


def in_child(work: Callable[[], Any]) -> Ended:
    """Runs `work` in a fork of this process, which has loaded everything already."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(read)
            os.write(write, json.dumps(work()).encode())
            status = 0
        except BaseException:  # noqa: BLE001  (whatever it is, the fork ends here)
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        said = stream.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Ended(json.loads(said) if said else None, status)


class Scenario(NamedTuple):
    """What is killed.

    Attributes:
        name: on the command line.
        folder: below which operations count.
        prepare: makes what is there before.
        run: the command.
        state: the digest of each file that must come out, by its name.
        seen: what is wrong with what a kill left, None if nothing is; before `run` again.
    """

    name: str
    folder: Path
    prepare: Callable[[], None]
    run: Callable[[], None]
    state: Callable[[], dict[str, str]]
    seen: Callable[[], str | None]


def count_points(scenario: Scenario) -> int:
    """How many points an undisturbed run has."""
    return int(_killed(scenario, None).said)


def _killed(scenario: Scenario, kill_at: int | None) -> Ended:
    scenario.prepare()

    def work() -> int:
        points = Points(scenario.folder, kill_at)
        points.install()
        scenario.run()
        return points.passed

    return in_child(work)


def failures(scenario: Scenario, points: Iterator[int] | range) -> Iterator[tuple[int, str]]:
    """(point, what is wrong) of every point whose kill is seen afterwards."""
    scenario.prepare()
    expected = in_child(lambda: (scenario.run(), scenario.state())[1]).said
    for point in points:
        ended = _killed(scenario, point)
        if ended.status != -signal.SIGKILL:
            yield point, f"it was not killed (status {ended.status})"
            continue

        def again() -> list[Any]:
            seen = scenario.seen()
            scenario.run()
            return [seen, scenario.state()]

        done = in_child(again)
        if done.status != 0:
            yield point, "the same command fails"
        elif done.said[0] is not None:
            yield point, done.said[0]
        elif done.said[1] != expected:
            names = {
                n for n in {*done.said[1], *expected} if done.said[1].get(n) != expected.get(n)
            }
            yield point, f"other bytes: {', '.join(sorted(names))}"


def scenarios(folder: Path) -> dict[str, Scenario]:
    """All of them, on a tiny model in `folder`."""
    base, shards = folder / "base", folder / "shards"

    def make() -> None:  # in a child: whoever forks has not used torch
        save_tiny("llama", base, train_tokenizer(), dtype=torch.bfloat16)
        save_tiny("llama", shards, train_tokenizer(), dtype=torch.bfloat16, shard_size="30KB")
        (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
        basis = torch.linalg.qr(torch.randn(32, 1)).Q.contiguous()
        save_file({"subspace": basis}, folder / "q.safetensors")

    in_child(make)
    for name, question in (("t", "Tell me about the"), ("n", "Name a")):
        (folder / f"{name}.txt").write_text("\n".join(f"{question} {x}." for x in "abcdefg"))
    (folder / "r.yaml").write_text(RECIPE.format(model=base))
    out, old = folder / "out" / "run", folder / "old"
    out.parent.mkdir()

    def build(*overrides: str, into: Path = out) -> None:
        options = Options(device="cpu", dtype="float32", force=True)
        pipeline.build(load_recipe(folder / "r.yaml", overrides=overrides), into, options=options)

    def emptied() -> None:
        shutil.rmtree(out, ignore_errors=True)

    def built() -> None:
        emptied()
        if not old.exists():
            in_child(lambda: build(into=old))
        shutil.copytree(old, out)

    first: dict[str, dict[str, str]] = {}  # checkpoints that may be published

    def whole(name: str, run: Callable[[], None]) -> dict[str, str]:
        if name not in first:
            emptied()
            first[name] = in_child(lambda: (run(), state_of(out))[1]).said
        return first[name]

    def baked(model: Path = base) -> None:
        if (out / "config.json").is_file() and not (out / ".partial").exists():
            return  # the kill came after the last step
        pipeline.bake_subspace(str(model), folder / "q.safetensors", out)

    def baked_in_threads() -> None:
        bake_in_threads(3)
        baked(shards)

    def limited() -> None:
        build("rollouts.limit=1")

    allowed = {"build": [whole("build", build)], "rerun": []}
    allowed["rerun"] = [*allowed["build"], whole("rerun", limited)]
    return {
        scenario.name: scenario
        for scenario in (
            Scenario(
                *("build", out.parent, emptied, build, lambda: state_of(out)),
                lambda: publishable(base, out, allowed["build"]),
            ),
            Scenario(
                *("rerun", out.parent, built, limited, lambda: state_of(out)),
                lambda: publishable(base, out, allowed["rerun"]),
            ),
            Scenario(
                *("bake", out.parent, emptied, baked, lambda: state_of(out)),
                lambda: loadable(base, out),
            ),
            Scenario(
                *("threads", out.parent, emptied, baked_in_threads, lambda: state_of(out)),
                lambda: loadable(shards, out),
            ),
        )
    }


def on_windows(scenario: Scenario) -> Scenario:
    """The scenario with its command under Windows' rules for files."""

    def run() -> None:
        with windows_rules(scenario.folder):
            scenario.run()

    return scenario._replace(run=run)


def publishable(base: Path, out: Path, allowed: list[dict[str, str]]) -> str | None:
    """What `publish --dry-run` would let pass, though it is no whole checkpoint of a recipe."""
    target = Target("somebody/tiny")
    subspace = out / "work" / "directions.safetensors"
    try:
        plan = plan_publish(
            base, out / "checkpoint", target, subspace=subspace if subspace.is_file() else None
        )
        plan_adapter(plan, out / "adapter", Target("somebody/adapter"))
    except AbliteratorError:
        return None
    # a file that was begun has another name, and is not published
    state = {name: digest for name, digest in state_of(out).items() if ".partial" not in name}
    return None if state in allowed else "publish takes a mixture"


def loadable(base: Path, out: Path) -> str | None:
    """What a loader would take of a bake, though it is not whole."""
    if not (out / "config.json").exists():
        return None
    names = {path.name for path in base.iterdir()} - {"README.md"}
    missing = [name for name in sorted(names) if not (out / name).is_file()]
    missing += [] if (out / "abliterator" / "edits.json").is_file() else ["edits.json"]
    return f"a loader takes it, without {', '.join(missing)}" if missing else None


def state_of(out: Path) -> dict[str, str]:
    """SHA-256 of every file that a run leaves for others; times are left out of account."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if not path.is_file() or name.startswith("work/"):
            continue
        data = path.read_bytes()
        if name in CARDS:  # it tells the times: whether it is the record's
            record = RunRecord.model_validate_json((out / RECORD).read_bytes())
            data = str(data.decode() == CARDS[name](record)).encode()
        if name == RECORD:
            record = json.loads(data)
            record["provenance"].pop("created")
            record.pop("timing")
            data = json.dumps(record).encode()
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def main() -> int:
    """Every point of every scenario, or of those named; 1 if one is seen afterwards."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "scenario",
        nargs="*",
        help="build, rerun, bake, threads; NAME:N for every n-th point [default: all]",
    )
    parser.add_argument("--every", type=int, default=1, help="only every n-th point")
    parser.add_argument("--first", type=int, default=1, help="the first point")
    parser.add_argument("--last", type=int, help="the last one")
    parser.add_argument("--windows", action="store_true", help="keep Windows' rules for files")
    asked = parser.parse_args()
    bad = 0
    # Every run is a fork: what it needs is imported once, and its garbage collections pass over it.
    importlib.import_module("transformers.models.llama.modeling_llama")
    importlib.import_module("transformers.generation.utils")
    importlib.import_module("scipy.optimize")
    package_modules()
    gc.collect()
    gc.freeze()
    with tempfile.TemporaryDirectory(prefix="kill-points-") as folder:
        known = scenarios(Path(folder).resolve())
        if asked.windows:
            known = {name: on_windows(scenario) for name, scenario in known.items()}
        for scenario in asked.scenario or known:
            name, _, every = scenario.partition(":")
            n = count_points(known[name])
            points = range(asked.first, min(n, asked.last or n) + 1, int(every or asked.every))
            wrong = 0
            for point, what in failures(known[name], points):
                wrong += 1
                print(f"{name}, point {point}: {what}", flush=True)
            print(
                f"{name}: {len(points)} of {n} points, {len(points) - wrong} bit-equal", flush=True
            )
            bad += wrong
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
