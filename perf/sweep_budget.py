"""A sweep by successive halving against judging every candidate on every prompt, in one run.

    python perf/sweep_budget.py recipes/smollm2.yaml --set model=FOLDER
    python perf/sweep_budget.py recipes/demo.yaml --reload

Prints each candidate's product on all held-out prompts, which one the recipe's schedule chooses,
for how many of the tokens, and wall times. `--reload` adds the loop that a sweep replaces:
every candidate baked, loaded and asked, one after the other. Layers are swept whatever the recipe
says; gates do not count, so that every candidate is judged.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import NamedTuple

from abliterator.bake import bake
from abliterator.directions import Place
from abliterator.engines import TransformersEngine
from abliterator.evaluation import EvaluationContext
from abliterator.model import load_model
from abliterator.pipeline import Options, Silent, plan_recipe, recipe_of, run_stages
from abliterator.pipeline._run import Run
from abliterator.pipeline._workspace import Workspace
from abliterator.pipeline.stages.selection import pool_of, selection_context
from abliterator.recipe import load_recipe
from abliterator.record import Estimate
from abliterator.selection import Pool, choose, judge_edits
from abliterator.selection._race import place_of
from abliterator.statistics import mean_interval

OPEN = {"max_kl": float("inf"), "min_induce": float("-inf")}


class Exhausted(NamedTuple):
    """What answering all prompts under every candidate gave, and took."""

    products: dict[Place, Estimate]
    tokens: int
    seconds: float


def exhausted(context: EvaluationContext, pool: Pool) -> Exhausted:
    """Every candidate judged on every held-out prompt."""
    started = perf_counter()
    judged = judge_edits(context, [pool.stack([place], 1).basis for place in pool.places])
    products = {}
    for place, one in zip(pool.places, judged, strict=True):
        scored = [product for product in one.products if product is not None]
        if (mean := Estimate.of(mean_interval(scored))) is not None:
            products[place] = mean
    tokens = sum(one.tokens for one in judged)
    return Exhausted(products, tokens, perf_counter() - started)


def note(started: float, what: str) -> None:
    """Progress on stderr."""
    print(f"{perf_counter() - started:7.1f} s  {what}", file=sys.stderr, flush=True)


def reloaded(run: Run, context: EvaluationContext, pool: Pool) -> float:
    """Seconds of the loop that bakes, loads and asks one candidate after the other."""
    started = perf_counter()
    for place in pool.places:
        with TemporaryDirectory() as folder:
            out = Path(folder) / "checkpoint"
            basis = pool.stack([place], 1).basis
            bake(run.plan.checkpoint, run.plan.edits, basis, out)
            engine = TransformersEngine(load_model(out, device=run.device, dtype=run.dtype))
            engine.answers(
                context.target.token_ids,
                max_new_tokens=context.max_new_tokens,
                batch_size=context.batch_size,
                stop_ids=context.engine.stop_ids,
            )
        note(started, f"layer {place} baked, loaded and asked")
    return perf_counter() - started


def main() -> None:
    """Runs both and prints them side by side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--every", type=int, default=1, help="take every n-th candidate only")
    parser.add_argument("--reload", action="store_true")
    asked = parser.parse_args()
    recipe = load_recipe(asked.recipe, overrides=["layers=sweep", "k=1", *asked.overrides])
    with TemporaryDirectory() as folder:
        out, options = Path(folder) / "out", Options(device="cpu")
        run_stages(recipe, out, until="capture", options=options)
        plan = plan_recipe(recipe, out)
        run = Run(recipe_of(out), plan, Workspace(out), options, Silent())
        compare(run, every=asked.every, reload=asked.reload)


def compare(run: Run, *, every: int, reload: bool) -> None:
    """The comparison, on stdout."""
    (context, scoring), whole = selection_context(run), pool_of(run)
    pool = replace(whole, places=list(whole.places)[::every])
    settings, started = run.recipe.selection, perf_counter()
    found = choose(
        context,
        scoring,
        pool,
        sweep=True,
        k=1,
        settings=settings.model_copy(update=OPEN),
        on_step=lambda step: note(started, step.name),
    )
    seconds = perf_counter() - started
    full = exhausted(context, pool)
    print("layer    bypass      KL  induce  product of all, n   rungs")
    for c in sorted(found.candidates, key=place_of):
        rungs = " ".join(f"{r.prompts}:{r.product.value:.3f}" for r in c.rungs if r.product)
        product = full.products[place_of(c)]
        told = f"{product.value:.3f}, {product.n}"
        print(f"{place_of(c)!s:7}{c.bypass:8.2f}{c.kl:8.3f}{c.induce:8.2f}  {told:18}{rungs}")
    best = max(full.products, key=lambda place: full.products[place].value)
    taken, tokens = (
        place_of(found.candidates[0]),
        sum(c.answers.tokens for c in found.candidates if c.answers),
    )
    high, reached = (full.products[place].value for place in (best, taken))
    print(
        f"exhaustive: layer {best}, product {high:.3f}; {full.tokens} tokens, {full.seconds:.0f} s "
        f"for answers\nhalving:    layer {taken}, product {reached:.3f} ({high - reached:.3f} "
        f"less); {tokens} tokens ({tokens / full.tokens:.2f} of them), {seconds:.0f} s with the "
        f"base and all cheap scores"
    )
    if reload:
        print(f"reload:     {reloaded(run, context, pool):.0f} s for answers alone")


if __name__ == "__main__":
    main()
