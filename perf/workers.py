"""Times a sweep on two workers against one process, with the same threads in all.

    python perf/workers.py
    python perf/workers.py --recipe recipes/smollm2.yaml --set model=FOLDER

Alternating, best of `--repeats`; the stage's own seconds, without starting workers and loading the
model, since both happen once a run. Prints one line a stage: one process with all threads, two
workers with half of them each, one process with one thread, and their ratios.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from abliterator.pipeline import Options, run_stages
from abliterator.recipe import load_recipe

STAGES = ("capture", "selection")
WAYS = {"one process": None, "two workers": 2}


def seconds(recipe: Path, overrides: list[str], workers: int | None) -> dict[str, float]:
    """Seconds of each stage of a sweep in a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        options = Options(device="cpu", dtype="float32", workers=workers)
        run_stages(
            load_recipe(recipe, overrides=overrides), out, until="selection", options=options
        )
        markers = (out / "work" / "stages" / f"{stage}.json" for stage in STAGES)
        texts = [marker.read_text(encoding="utf-8") for marker in markers]
        sweep = (out / "work" / "sweep.json").read_text(encoding="utf-8")
    found = {s: json.loads(t)["seconds"] for s, t in zip(STAGES, texts, strict=True)}
    return found | {"sweep": hash(sweep)}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=Path("recipes/demo.yaml"))
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU, in all")
    arguments = parser.parse_args()
    overrides = ["layers=sweep", "k=1", *arguments.overrides]
    torch.set_num_threads(arguments.threads)
    ways = {**WAYS, "one thread": None}
    taken: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for repeat in range(arguments.repeats):
        for way, workers in ways.items():
            torch.set_num_threads(1 if way == "one thread" else arguments.threads)
            taken[way].append(seconds(arguments.recipe, overrides, workers))
            print(repeat, way, taken[way][-1], flush=True)
    same = len({run["sweep"] for runs in taken.values() for run in runs})
    print(f"different sweep.json: {same}")
    for stage in STAGES:
        best = {way: min(run[stage] for run in runs) for way, runs in taken.items()}
        two = best["two workers"]
        ratios = ", ".join(f"{way} {t:.2f} s ({t / two:.2f} x)" for way, t in best.items())
        print(f"{stage}: {ratios}")


if __name__ == "__main__":
    main()
