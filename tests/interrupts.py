"""Interrupt a tuned build of the demo at random moments; count what is done twice, compare bits.

    python -m tests.interrupts               # ten moments with SIGINT, ten with SIGKILL
    python -m tests.interrupts --moments 3 --seed 7

A child process builds up to the answers, and reports each batch of prompts captured or answered and
each finished phase and trial of the tuning on its standard output. It gets its signal at a random
report; the same command is given until it ends. No prompt may be captured or answered twice, no
phase descended twice. Moments, directions, tuned edits and answers must be those of an undisturbed
run to the last bit.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from abliterator import pipeline
from abliterator.pipeline import Options
from abliterator.recipe import load_recipe

ROOT = Path(__file__).parents[1]
SETTINGS = (
    *("edit.strength=auto", "directions.estimator=tuned", "tuning.steps=4", "tuning.prompts=48"),
    *("tuning.kl_weights=[20,5]", "selection.prompts=16", "rollouts.batch_size=8"),
    *("capture.max_batch_tokens=128", "rollouts.max_new_tokens=16"),
)
FILES = ("moments.safetensors", "tuning.json", "tuning.safetensors", "directions.safetensors")
UNITS = ("capture", "answers")  # prompts of all sets


class Reporting(pipeline.Silent):
    """Prints what is done, a line each, with the label of its bar."""

    @contextmanager
    def bar(self, label, total, *, unit=""):
        def advance(amount, *, status=""):
            kind = next((kind for kind in UNITS if kind in label), label)
            if kind == "tuning":
                kind = status.split()[-1] if "judged" in status else "step"
            print(kind, amount, flush=True)

        yield advance


def build(out: Path) -> None:
    """What a child does."""
    recipe = load_recipe(ROOT / "recipes" / "demo.yaml", overrides=SETTINGS)
    options = Options(device="cpu", dtype="float32")
    pipeline.run_stages(recipe, out, until="rollouts", options=options, progress=Reporting())


def run(out: Path, sent: signal.Signals | None, at: int) -> tuple[bool, Counter[str], float]:
    """Runs a child, which gets `sent` at its report `at`: did it end, reports, seconds to die."""
    command = [sys.executable, "-m", "tests.interrupts", "--child", str(out)]
    done: Counter[str] = Counter()
    seconds = 0.0
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE) as child:
        for number, line in enumerate(child.stdout or ()):
            kind, amount = line.split()
            done[kind] += int(amount)
            if sent is not None and number == at:
                time.sleep(random.random() / 10)
                child.send_signal(sent)
                start = time.perf_counter()
                rest, _ = child.communicate()
                seconds = time.perf_counter() - start
                for more in rest.splitlines():
                    kind, amount = more.split()
                    done[kind] += int(amount)
                break
    return child.returncode == 0, done, seconds


def state_of(out: Path) -> dict[str, str]:
    """SHA-256 of the results."""
    paths = [*(out / "work" / name for name in FILES), out / "work" / "rollouts.jsonl"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def main() -> int:
    """All moments; 1 if something was done twice or has other bits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=10)
    parser.add_argument("--signals", nargs="+", default=["SIGINT", "SIGKILL"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        atexit.register(gc.freeze)  # as the command line does
        try:
            build(given.child)
        except KeyboardInterrupt:
            return 130
        return 0
    rng, wrong = random.Random(given.seed), 0
    with tempfile.TemporaryDirectory(prefix="interrupts-") as folder:
        _, whole, _ = run(Path(folder, "whole"), None, 0)
        expected, reports = state_of(Path(folder, "whole")), 0
        print(f"undisturbed: {dict(whole)}", flush=True)
        for sent in map(signal.Signals.__getitem__, given.signals):
            out, total, slowest = Path(folder, sent.name), Counter[str](), 0.0
            for _ in range(given.moments):
                ended, done, seconds = run(out, sent, rng.randrange(2, 14))
                total, slowest, reports = total + done, max(slowest, seconds), reports + 1
                if ended:
                    break
            while not ended:
                ended, done, _ = run(out, None, 0)
                total += done
            twice = {k: total[k] - n for k, n in whole.items() if total[k] != n}
            state = state_of(out)
            other = [name for name in expected if state[name] != expected[name]]
            print(
                f"{sent.name}: ended {slowest:.2f} s after its signal at most; beside what an "
                f"undisturbed run does: {twice or 'nothing'}; other bits: {other or 'nowhere'}",
                flush=True,
            )
            wrong += bool(other) or not twice.keys().isdisjoint(UNITS)
            shutil.rmtree(out)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
