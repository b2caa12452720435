"""What a build will need: where weights will lie, prompts, time and memory, and what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from abliterator.costs import Machine, calibrate, known_machine, remember
from abliterator.devices import AUTO, device_memory
from abliterator.errors import RecipeError
from abliterator.pipeline._estimate import Estimate, estimate
from abliterator.pipeline._missing import Missing, missing
from abliterator.pipeline._options import Options
from abliterator.pipeline._plan import Plan
from abliterator.pipeline._planned_prompts import PlannedPrompts, planned_prompts
from abliterator.pipeline._where import Where, where_weights_lie
from abliterator.recipe import Recipe

_LONG = 1800  # seconds of answers beyond which a plan says what makes them shorter


def with_outlook(
    plan: Plan, recipe: Recipe | None, out: Path, options: Options, *, measure: bool = False
) -> Plan:
    """The plan with what a build needs of this machine; nothing heavy runs.

    Args:
        plan: of the recipe, or of a model alone.
        recipe: what is built; None for a model alone.
        out: where it would be built.
        options: device, dtype and memory of computation.
        measure: whether to measure this machine, which takes seconds; else its rates are those
            that were measured before, and without any there is no estimate.
    """
    lacks: list[Missing] = []
    try:
        where = _where(plan, options)
    except RecipeError as error:
        lacks.append(Missing(what="device", problem=str(error)))
        where = _where(plan, replace(options, device=AUTO))
    machine = _machine(where, out, measure=measure)
    if recipe is None:
        return replace(plan, where=where, missing=tuple(lacks))
    prompts = planned_prompts(recipe, plan.source.folder)
    lacks += missing(recipe, plan, prompts, out)
    costs = estimate(recipe, plan, prompts, machine) if machine and prompts.lengths else None
    lacks += _memory(plan)
    return replace(
        plan,
        where=where,
        prompts=prompts,
        estimate=costs,
        missing=tuple(lacks),
        notes=(*plan.notes, *_warnings(where, prompts, costs)),
    )


def _where(plan: Plan, options: Options) -> Where:
    return where_weights_lie(
        plan.checkpoint,
        device=options.device,
        dtype=options.dtype,
        max_memory=options.max_memory,
    )


def _machine(where: Where, out: Path, *, measure: bool) -> Machine | None:
    if not measure:
        return known_machine(where.device, where.dtype)
    existing = out.absolute()
    while not existing.is_dir():
        existing = existing.parent
    machine = calibrate(where.device, where.dtype, folder=existing)
    remember(machine)
    return machine


def _memory(plan: Plan) -> Iterator[Missing]:
    """Too little host memory for the largest tensor's edit, which nothing makes smaller."""
    total = device_memory("cpu").total
    if plan.bake_memory > total:
        yield Missing(
            what="memory",
            problem=f"The edit of the largest tensor needs {plan.bake_memory / 1e9:.1f} GB of host "
            f"memory, and this machine has {total / 1e9:.1f} GB. Bake on a machine with more.",
        )


def _warnings(where: Where, prompts: PlannedPrompts, costs: Estimate | None) -> Iterator[str]:
    """Notes on memory that is short, and on what the estimate assumes."""
    if where.streams:
        yield (
            f"The weights do not fit in memory: {where.places['disk'] / 1e9:.1f} GB of "
            f"{where.weights / 1e9:.1f} GB stay on disk, and are read for every token of an "
            "answer, which takes hours. Choose a smaller dtype (`--dtype bfloat16`), a machine "
            "with more memory, or an engine for the answers (a server)."
        )
    elif costs is not None:
        yield from _short_memory(where, costs)
    if costs is not None:
        yield from _long_answers(costs)
    for dataset in prompts.assumed:
        yield f"How many rows {dataset} has is not known before it is read; 400 are assumed."


def _long_answers(costs: Estimate) -> Iterator[str]:
    """A note where most of a long build are answers."""
    rollouts = next(stage for stage in costs.stages if stage.stage == "rollouts").seconds
    if rollouts > max(_LONG, costs.seconds / 2):
        yield (
            f"Of about {costs.seconds / 3600:.1f} hours, answers take {rollouts / 3600:.1f}: an "
            "accelerator or an engine (vLLM, a server) gives them faster, and `rollouts.limit` and "
            "`rollouts.max_new_tokens` make them fewer."
        )


def _short_memory(where: Where, costs: Estimate) -> Iterator[str]:
    """Notes on stages whose peak is beyond the memory that is free now."""
    for name, free in (("host_memory", where.free["cpu"]), ("device_memory", _room(where))):
        stage = max(costs.stages, key=lambda stage: getattr(stage, name))
        needed = getattr(stage, name)
        if needed > free:
            kind = name.replace("_memory", "")
            yield (
                f"The stage `{stage.stage}` needs about {needed / 1e9:.1f} GB of {kind} memory, "
                f"and {free / 1e9:.1f} GB are free. Choose a smaller dtype (`--dtype bfloat16`), "
                "smaller batches (`rollouts.batch_size`, `benchmarks.batch_size`, "
                "`capture.max_batch_tokens`), or `--device auto`, which spreads the weights."
            )


def _room(where: Where) -> int:
    """Free bytes on the accelerators that hold weights."""
    return sum(where.free[place] for place in where.places if place in where.free)
