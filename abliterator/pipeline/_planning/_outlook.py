"""What a build will need: where weights will lie, prompts, time and memory, and what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from abliterator.costs import Machine, calibrate, known_machine, remember
from abliterator.devices import AUTO, CPU, device_memory
from abliterator.errors import RecipeError, WorkerError
from abliterator.pipeline._local_judge import judge_on_disk
from abliterator.pipeline._options import Options
from abliterator.pipeline._planning._estimate import Estimate, estimate
from abliterator.pipeline._planning._missing import Missing, missing
from abliterator.pipeline._planning._plan import Plan, plan_source
from abliterator.pipeline._planning._planned_prompts import PlannedPrompts, planned_prompts
from abliterator.pipeline._planning._setup import engines_of, is_read_by_blocks, setup_of
from abliterator.pipeline._planning._where import Where, where_weights_lie
from abliterator.pipeline._workspace import Workspace
from abliterator.pipeline.stages import stages_of
from abliterator.recipe import Recipe
from abliterator.source import ModelSource, folder_on_disk

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
    try:
        _require_workers(where, options)
    except WorkerError as error:
        lacks.append(Missing(what="device", problem=str(error)))
    machine = _machine(where, out, measure=measure)
    if recipe is None:
        return replace(plan, where=where, missing=tuple(lacks))
    prompts = planned_prompts(recipe, plan.source.folder)
    lacks += missing(recipe, plan, prompts, out)
    costs = None
    if machine and prompts.lengths:
        setup = setup_of(recipe, plan, where, options, machine)
        costs = estimate(recipe, plan, prompts, machine, setup)
    lacks += _memory(plan)
    return replace(
        plan,
        where=where,
        prompts=prompts,
        estimate=costs,
        missing=tuple(lacks),
        notes=(*plan.notes, *_warnings(recipe, plan, where, prompts, costs, options)),
    )


def expected_seconds(
    recipe: Recipe, out: Path, *, until: str = "card", options: Options | None = None
) -> float | None:
    """Seconds that the unfinished stages of a build take at most, about: answers at full length.

    None where that is not known: this machine was not measured, the model is not on it yet, or a
    server or a cluster does part of the work. Headers alone are read, and nothing is downloaded.

    Args:
        recipe: what is built.
        out: where; stages that were finished there are not counted.
        until: the last stage.
        options: device, dtype, memory and workers.
    """
    options = options or Options()
    with suppress(Exception):  # the build itself reports what is wrong
        folder = folder_on_disk(recipe.model, revision=recipe.revision)
        if folder is None or options.ray is not None or "server" in engines_of(recipe):
            return None
        plan = plan_source(ModelSource(folder, recipe.model, recipe.revision), recipe, out)
        where = _where(plan, options)
        machine = known_machine(where.device, where.dtype)
        prompts = machine and planned_prompts(recipe, folder)
        if machine and prompts and prompts.lengths:
            setup = setup_of(recipe, plan, where, options, machine)
            costs = estimate(recipe, plan, prompts, machine, setup)
            names = {stage.name for stage in stages_of(recipe, until)}
            pending = {name for name in names if Workspace(out).marker(name) is None}
            return sum(stage.seconds for stage in costs.stages if stage.stage in pending)
    return None


def _where(plan: Plan, options: Options) -> Where:
    return where_weights_lie(
        plan.checkpoint,
        device=options.device,
        dtype=options.dtype,
        max_memory=options.max_memory,
    )


def _require_workers(where: Where, options: Options) -> None:
    """Raises WorkerError for workers that cannot be; a Ray cluster is not asked."""
    pool = options.pool
    if pool is not None and options.ray is None and where.device != CPU:
        pool.require_room()


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
    if plan.edit_memory > total:
        yield Missing(
            what="memory",
            problem=f"The edit of the largest tensor needs {plan.edit_memory / 1e9:.1f} GB of host "
            f"memory, and this machine has {total / 1e9:.1f} GB. Bake on a machine with more.",
        )


def _warnings(
    recipe: Recipe,
    plan: Plan,
    where: Where,
    prompts: PlannedPrompts,
    costs: Estimate | None,
    options: Options,
) -> Iterator[str]:
    """Notes on memory that is short, and on what the estimate assumes and leaves out."""
    here = engines_of(recipe).answers == "process"
    if where.streams:
        yield _on_disk(plan, where, costs, options, here=here)
    elif costs is not None:
        yield from _short_memory(where, costs)
    if costs is not None and here and not where.streams:
        yield from _long_answers(costs)
    if costs is not None:
        yield from _not_counted(recipe, options)
    yield from prompts.remarks(recipe.rollouts)
    if recipe.judge.kind == "local":
        yield _judge_note(recipe, plan, where, options)
    for dataset in prompts.assumed:
        yield f"How many rows {dataset} has is not known before it is read; 400 are assumed."


def _judge_note(recipe: Recipe, plan: Plan, where: Where, options: Options) -> str:
    """Where a local judge will lie, and when."""
    settings = recipe.judge
    judge = judge_on_disk(settings, plan.checkpoint)
    if judge is None:
        return (
            f"The judge {settings.model} is not on this machine: the build downloads it first, and "
            "its time and memory are not part of the estimate."
        )
    alone = where_weights_lie(
        judge, device=options.device, dtype=options.dtype, max_memory=options.max_memory
    )
    size = f"{alone.weights / 1e9:.1f} GB in {alone.dtype}"
    name = "the base itself" if settings.is_base else Path(settings.model).name
    text = f"The judge ({name}, {size}) is loaded when base and edited are answered and freed"
    text += ", in part on disk, which is slow" if alone.streams else ""
    if recipe.selection.judge != "recipe" or not (recipe.selects or recipe.tunes):
        return f"{text}."
    both, free = alone.weights + where.weights, max(_room(where), _room(alone))
    fits = "which fits" if both < free else "which does not fit: take a smaller judge or dtype"
    return (
        f"{text}. Candidates are judged while the base answers: both lie in memory, "
        f"{both / 1e9:.1f} of {free / 1e9:.1f} GB that are free, {fits}."
    )


def _on_disk(
    plan: Plan, where: Where, costs: Estimate | None, options: Options, *, here: bool
) -> str:
    """What weights that do not fit in memory mean for passes, answers and tuning."""
    part = f"{where.places['disk'] / 1e9:.1f} GB of {where.weights / 1e9:.1f} GB"
    if options.divides:
        return (
            f"The weights do not fit in memory: {part} are too many, and each worker holds all of "
            "them on one device. Leave out `--workers` and `--ray`, or choose a smaller dtype."
        )
    passes = " Capture, divergence and the scores of a sweep read every block once a pass, for all "
    passes = f"{passes}prompts together." if is_read_by_blocks(plan, where, options) else ""
    if not here:
        return f"The weights do not fit in memory: {part} stay on disk.{passes}"
    hours = "hours"
    if costs is not None:
        slow = ("rollouts", "tuning", "benchmarks")
        seconds = sum(stage.seconds for stage in costs.stages if stage.stage in slow)
        hours = f"{seconds / 3600:.1f} of about {costs.seconds / 3600:.1f} hours"
    return (
        f"The weights do not fit in memory: {part} stay on disk, and are read for every token of "
        f"an answer, in every batch of a benchmark and every step of a tuning, which takes {hours}."
        f"{passes} Use an engine for the answers: `engine:` in the recipe (vllm, or a server), a "
        "smaller dtype (`--dtype bfloat16`), or a machine with more memory."
    )


def _not_counted(recipe: Recipe, options: Options) -> Iterator[str]:
    """What the estimate says nothing of: servers, memory of engines, clusters."""
    engines = engines_of(recipe)
    parts = {"answers": engines.answers, "benchmarks": engines.benchmarks}
    if served := [name for name, by in parts.items() if by == "server"]:
        yield (
            f"A server gives the {' and the '.join(served)}: how long it takes is not known here, "
            "and not part of the time."
        )
    if "engine" in parts.values():
        yield (
            "vLLM is assumed to reach 70 % of its devices' speed and to start in 90 seconds; its "
            "memory is not part of the peak."
        )
    if options.ray is not None:
        counted = f"{options.workers} workers" if options.workers else "one process"
        yield (
            f"The time is that of {counted} on this machine: what nodes of a Ray cluster do is not "
            "known here."
        )
    elif options.workers is not None and options.workers > 1:
        yield (
            f"The peak of memory is that of one of {options.workers} workers, each with the whole "
            "model; their number makes no tuning faster."
        )


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
