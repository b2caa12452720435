"""A sweep by successive halving against judging every candidate on every prompt, in one run.

    python benchmarks/sweep_budget.py recipes/smollm2.yaml --set model=FOLDER
    python benchmarks/sweep_budget.py recipes/demo.yaml --reload

Prints each candidate's product on all held-out prompts, which one the recipe's schedule chooses,
for how many of the tokens, and both wall times. `--reload` adds the loop that a sweep replaces:
every candidate baked, loaded and asked, one after the other. Layers are swept whatever the recipe
says; gates do not count, so that every candidate is judged.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from abliterator.bake import bake
from abliterator.generation import generate, stop_ids
from abliterator.model import load_model
from abliterator.pipeline import Options, Silent, plan_recipe, recipe_of, run_stages
from abliterator.pipeline._extraction import pool_of
from abliterator.pipeline._run import Run
from abliterator.pipeline._selection import subject_of
from abliterator.pipeline._workspace import Workspace
from abliterator.recipe import load_recipe
from abliterator.selection import Candidate, Gates, Pool, Search, Subject, choose

OPEN = Gates(max_kl=float("inf"), min_induce=float("-inf"))


def swept(subject: Subject, pool: Pool, search: Search) -> tuple[tuple[Candidate, ...], int, float]:
    """Candidates, the best first; tokens generated for them; seconds."""
    started = perf_counter()
    found = choose(
        subject, pool, sweep=True, k=1, search=search, on_step=lambda what: note(started, what)
    )
    tokens = sum(c.answers.tokens for c in found.candidates if c.answers)
    return found.candidates, tokens, perf_counter() - started


def note(started: float, what: str) -> None:
    """Progress on stderr."""
    print(f"{perf_counter() - started:7.1f} s  {what}", file=sys.stderr, flush=True)


def reloaded(run: Run, subject: Subject, pool: Pool) -> float:
    """Seconds of the loop that bakes, loads and asks one candidate after the other."""
    started = perf_counter()
    for place in pool.places:
        with TemporaryDirectory() as folder:
            out = Path(folder) / "checkpoint"
            basis = pool.stack([place], 1).basis
            bake(run.plan.checkpoint, run.plan.edits, basis, out)
            loaded = load_model(out, device=run.device, dtype=run.dtype)
            generate(
                loaded,
                subject.held_out.token_ids,
                max_new_tokens=subject.max_new_tokens,
                batch_size=subject.batch_size,
                stop_ids=stop_ids(subject.loaded),
            )
        note(started, f"layer {place} baked, loaded and asked")
    return perf_counter() - started


def main() -> None:
    """Runs both and prints them side by side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--reload", action="store_true")
    asked = parser.parse_args()
    recipe = load_recipe(asked.recipe, overrides=["layers=sweep", "k=1", *asked.overrides])
    with TemporaryDirectory() as folder:
        out, options = Path(folder) / "out", Options(device="cpu")
        run_stages(recipe, out, until="capture", options=options)
        plan = plan_recipe(recipe, out)
        run = Run(recipe_of(out), plan, Workspace(out), options, Silent())
        compare(run, reload=asked.reload)


def compare(run: Run, *, reload: bool) -> None:
    """The comparison, on stdout."""
    subject, pool = subject_of(run, run.loaded(run.plan.source.folder)), pool_of(run)
    settings = run.recipe.selection
    halving = Search(
        gates=OPEN, survivors=settings.survivors, schedule=settings.schedule, seed=run.recipe.seed
    )
    short, few, quick = swept(subject, pool, halving)
    everything = Search(gates=OPEN, survivors=len(pool.places), seed=run.recipe.seed)
    full, all_tokens, slow = swept(subject, pool, everything)
    products = {c.place: c.answers.product for c in full if c.answers}
    print("layer   bypass      KL  induce  product of all, n      rungs")
    racing = {c.place: c for c in short}
    for c in sorted(full, key=lambda c: c.place):
        found, rungs = products[c.place], racing[c.place].rungs
        told = " ".join(f"{r.prompts}:{r.product.value:.3f}" for r in rungs if r.product)
        product = "unscored" if found is None else f"{found.value:.3f}, {found.n}"
        print(f"{c.place!s:6}{c.bypass:8.2f}{c.kl:8.3f}{c.induce:8.2f}  {product:22}{told}")
    best, taken = products[full[0].place], products[short[0].place]
    assert best is not None
    assert taken is not None
    print(
        f"exhaustive: layer {full[0].place}, product {best.value:.3f}; {all_tokens} tokens, "
        f"{slow:.0f} s\nhalving:    layer {short[0].place}, product {taken.value:.3f} (short of "
        f"the best by {best.value - taken.value:.3f}); {few} tokens ({few / all_tokens:.2f} of "
        f"them), {quick:.0f} s"
    )
    if reload:
        print(f"reload:     {reloaded(run, subject, pool):.0f} s for answers alone")


if __name__ == "__main__":
    main()
