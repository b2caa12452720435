"""How a build will use this machine, for its estimate: disk, workers, engines, cores of a bake."""

from __future__ import annotations

from abliterator.bake import bake_workers
from abliterator.costs import Answerer, Machine, Setup
from abliterator.devices import AUTO, CPU, usable_cores
from abliterator.pipeline._options import Options
from abliterator.pipeline._planning._plan import Plan
from abliterator.pipeline._planning._where import DISK, Where
from abliterator.pipeline.stages.benchmarks import benchmark_engine
from abliterator.recipe import EngineKind, Recipe

_BY: dict[EngineKind, Answerer] = {
    "transformers": "process",
    "vllm": "engine",
    "server": "server",
}


def setup_of(recipe: Recipe, plan: Plan, where: Where, options: Options, machine: Machine) -> Setup:
    """How the build of a recipe uses this machine.

    Args:
        recipe: its engines are read.
        plan: of it.
        where: the weights will lie.
        options: device and workers.
        machine: its threads are divided among workers.
    """
    return engines_of(recipe)._replace(
        on_disk=0 if options.divides else where.places.get(DISK, 0),
        streams=is_read_by_blocks(plan, where, options),
        devices=max(1, len(where.places.keys() - {CPU, DISK})),
        speedup=_speedup(options.workers or 1, machine),
        bake_workers=bake_workers(plan.checkpoint, plan.edits),
    )


def is_read_by_blocks(plan: Plan, where: Where, options: Options) -> bool:
    """Whether passes over many prompts read weights block by block, as far as config.json says it.

    Quantised weights and models with code of their own are placed in memory and on disk.
    """
    whole = {"quantization_config", "auto_map"} & plan.checkpoint.config.keys()
    return where.streams and options.device == AUTO and not (options.divides or whole)


def engines_of(recipe: Recipe) -> Setup:
    """What answers and scores for a recipe."""
    engine, by = recipe.engine, _BY[recipe.engine.kind]
    return Setup(
        answers=by,
        candidates="process" if by == "server" else by,
        benchmarks=_benchmarks(recipe),
        engine_devices=engine.tensor_parallel * engine.pipeline_parallel,
        engine_batch=engine.concurrency,
    )


def _benchmarks(recipe: Recipe) -> Answerer:
    if benchmark_engine(recipe) == recipe.benchmarks.engine:
        return _BY[recipe.benchmarks.engine.kind]
    return _BY[recipe.engine.kind]


def _speedup(workers: int, machine: Machine) -> float:
    """Of workers together against this process, whose threads are divided among them on a CPU."""
    if machine.accelerator:
        return workers
    threads = workers * max(1, machine.threads // workers)
    return max(1.0, min(threads, usable_cores() or threads) / machine.threads)
