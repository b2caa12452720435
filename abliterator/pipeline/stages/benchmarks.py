"""lm-eval on base and edited.

The stage writes work/benchmarks/SIDE/TASK.json.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterator.files import digest_of, portable_name
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Artefact, Stage
from abliterator.pipeline.stages.rollouts import SIDES, folder_of
from abliterator.recipe import Recipe
from abliterator.record import Side

if TYPE_CHECKING:
    from abliterator.benchmarks import Task, TaskScores


def benchmark_tasks(recipe: Recipe, device: str) -> Sequence[Task]:
    """The loaded tasks of a recipe, after checking that their engine is installed.

    Args:
        recipe: its `benchmarks` are read.
        device: where they will be computed.

    Raises:
        BenchmarkError: for what would stop the benchmarks later.
    """
    settings = recipe.benchmarks
    if not (settings.preset or settings.tasks):
        return ()
    from abliterator.benchmarks import preset_tasks, require_engine, resolve_tasks

    require_engine(settings.engine, device)
    tasks = [*preset_tasks(settings.preset), *settings.tasks]
    return resolve_tasks(tasks, folder=Path.cwd(), revisions=settings.revisions)


def pin_tasks(recipe: Recipe, tasks: Sequence[Task]) -> Recipe:
    """The recipe with the commits of its tasks' Hub datasets, so that it means the same later."""
    resolved = {task.dataset: task.revision for task in tasks if task.dataset and task.revision}
    revisions = {**resolved, **recipe.benchmarks.revisions}
    benchmarks = recipe.benchmarks.model_copy(update={"revisions": revisions})
    return recipe.model_copy(update={"benchmarks": benchmarks})


def _key(run: Run) -> Any:
    return [
        {side: _side_digest(run, side) for side in SIDES},
        run.recipe.published()["benchmarks"],
        run.recipe.published()["chat"],
        {task.name: task.digest for task in run.tasks},
        run.dtype,
    ]


def _side_digest(run: Run, side: Side) -> str:
    return digest_of([run.base_digest(), run.digest("bake") if side == "edited" else None])


def _run(run: Run) -> list[Path]:
    if not run.tasks:
        return []
    from abliterator.benchmarks import (
        RunSettings,
        ScoredCheckpoint,
        measure_sides,
        score_on_workers,
    )

    _note_plain_http(run)
    settings = RunSettings(
        section=run.recipe.benchmarks,
        chat=run.recipe.chat,
        **run.options.weights,
        dtype=run.dtype,
        trust_remote_code=run.recipe.trust_remote_code,
    )
    sides = {
        side: ScoredCheckpoint(folder_of(run, side), _side_digest(run, side)) for side in SIDES
    }
    secrets, out = key_names(run.recipe.published()), run.workspace.work / "benchmarks"
    with run.progress.bar("benchmark tasks, both sides", len(SIDES) * len(run.tasks)) as advance:

        def on_task(side: Side, task: str) -> None:
            advance(1)

        arguments: dict[str, Any] = {"out": out, "on_task": on_task, "secrets": secrets}
        if run.options.pool is not None and settings.section.engine.kind == "transformers":
            pool = run.workers(run.options.pool)
            score_on_workers(pool, sides, run.tasks, settings, **arguments)
            del arguments["on_task"]
        run.free()
        measure_sides(sides, run.tasks, settings, **arguments)
    return [_scores(side, task).path(run) for side in SIDES for task in run.tasks]


def _note_plain_http(run: Run) -> None:
    """Notes that lm-eval's key, if there is one, would cross a network unencrypted."""
    from abliterator.server import warn_of_plain_http

    engine = run.recipe.benchmarks.engine
    variable = "OPENAI_API_KEY" if os.environ.get("OPENAI_API_KEY") else None
    for name in ("base_url", "edited_url"):
        url = getattr(engine, name) or ""
        if warning := warn_of_plain_http(url, variable, name=f"benchmarks.engine.{name}"):
            run.progress.note(warning)


def key_names(plain: Any) -> set[str]:
    """Names of the environment variables that hold keys, wherever a recipe states one."""
    if isinstance(plain, list):
        return set().union(*map(key_names, plain))
    if not isinstance(plain, dict):
        return set()
    variable = plain.get("api_key_env")
    return set().union(
        [variable] if isinstance(variable, str) else [], *map(key_names, plain.values())
    )


def _scores(side: Side, task: Task) -> Artefact:
    name = portable_name(task.name, ".json")
    return Artefact("benchmarks", f"work/benchmarks/{side}/{name}")


def task_scores(run: Run, side: Side) -> dict[str, TaskScores]:
    """Scores of every task on one side; none where no task was run."""
    from abliterator.benchmarks import TaskScores

    return {
        task.name: TaskScores.model_validate(_scores(side, task).read(run)["scores"])
        for task in run.tasks
    }


BENCHMARKS = Stage("benchmarks", 4, _key, _run)
