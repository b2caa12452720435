"""Times a sweep on two workers against one process, with the same threads in all.

    python perf/workers.py
    python perf/workers.py --recipe recipes/smollm2.yaml --set model=FOLDER

Alternating, best of `--repeats`; the stage alone, without starting workers and loading the model,
since both happen once a run. On a machine that others use, wall times say little: the seconds of
CPU on the longest path (this process, and the busiest worker) are what wall time is without others.
Results of one process with as many threads as a worker has must be equal, and are compared.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
from pathlib import Path
from time import perf_counter, process_time
from typing import NamedTuple

import psutil
import torch

from abliterator.files import sha256_of_bytes
from abliterator.pipeline import Options, Silent, run_stages
from abliterator.recipe import load_recipe


class Cost(NamedTuple):
    """Seconds of the stage, and the digest of its result."""

    wall: float
    path: float  # CPU of this process and of the busiest worker
    digest: str


class Meter(Silent):
    """Measures from the start of the stage `selection` on."""

    def __init__(self) -> None:
        self._started: dict[str, float] = {}
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self.is_over = threading.Event()

    def stage(self, name: str, *, done: bool) -> None:
        """Notes when the stage begins."""
        if name == "selection":
            self._started = {"wall": perf_counter(), "cpu": process_time()}
            threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        workers = psutil.Process().children(recursive=True)
        while not self.is_over.wait(0.1):
            for worker in workers:
                try:
                    times = worker.cpu_times()
                except psutil.Error:
                    continue
                self._last[worker.pid] = times.user + times.system
                self._first.setdefault(worker.pid, self._last[worker.pid])

    def cost(self, digest: str) -> Cost:
        """What was measured until now."""
        self.is_over.set()
        busiest = max((t - self._first[pid] for pid, t in self._last.items()), default=0.0)
        wall, own = perf_counter() - self._started["wall"], process_time() - self._started["cpu"]
        return Cost(wall, own + busiest, digest)


def measure(recipe: Path, overrides: list[str], workers: int | None) -> Cost:
    """The cost of a sweep in a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        out, meter = Path(folder) / "out", Meter()
        run_stages(
            load_recipe(recipe, overrides=overrides),
            out,
            until="selection",
            options=Options(device="cpu", dtype="float32", workers=workers),
            progress=meter,
        )
        return meter.cost(sha256_of_bytes((out / "work" / "sweep.json").read_bytes()))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=Path("recipes/demo.yaml"))
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU, in all")
    arguments = parser.parse_args()
    overrides = ["layers=sweep", "k=1", *arguments.overrides]
    all_threads = arguments.threads
    ways = {
        "one process, all threads": (None, all_threads),
        "one process, half of them": (None, max(1, all_threads // 2)),
        "two workers": (2, all_threads),
    }
    costs: dict[str, list[Cost]] = {way: [] for way in ways}
    for repeat in range(arguments.repeats):
        for way, (workers, threads) in ways.items():
            torch.set_num_threads(threads)
            costs[way].append(measure(arguments.recipe, overrides, workers))
            print(repeat, way, *costs[way][-1], flush=True)
    two = costs["two workers"]
    equal = {c.digest for c in two} == {c.digest for c in costs["one process, half of them"]}
    print("sweep.json:", "equal" if equal else "DIFFERENT")
    for way, of_way in costs.items():
        wall, path = (min(values) for values in list(zip(*of_way, strict=True))[:2])
        ratios = wall / min(c.wall for c in two), path / min(c.path for c in two)
        print(f"{way}: wall {wall:.2f} s ({ratios[0]:.2f} x), CPU {path:.2f} s ({ratios[1]:.2f} x)")


if __name__ == "__main__":
    main()
