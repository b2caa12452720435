"""Benchmark scores of two checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abliterator.benchmarks import (
    ScoredCheckpoint,
    StoppedChild,
    TaskScores,
    compare_tasks,
    measure_sides,
)
from abliterator.checkpoint import fingerprint
from abliterator.comparison._beside import Setup, link_with_base_prompting
from abliterator.comparison._models import SingleModelLoader
from abliterator.comparison._settings import SIDES, CompareSettings
from abliterator.errors import BenchmarkError
from abliterator.evaluation import Bar, answers_of, score_conversations
from abliterator.record import Asking, OwnScores, Side


def conversation_scores(
    models: SingleModelLoader, settings: CompareSettings, bar: Bar
) -> dict[Side, dict[str, TaskScores]]:
    """Scores of both sides on the tasks of the conversation suite."""
    scores: dict[Side, dict[str, TaskScores]] = {side: {} for side in SIDES}
    run = settings.benchmarks
    for side, own in scores.items():
        for task in settings.tasks:
            if task.skill is not None:
                with bar(f"{side} answers, {task.name}", answers_of(task, run.section)) as advance:
                    own[task.name] = score_conversations(
                        models.answering(side),
                        task,
                        run.section,
                        run.chat,
                        settings={"dtype": run.dtype, "engine": settings.engine.kind},
                        stop_ids=models.stop_ids,
                        on_batch=advance,
                    )
    return scores


def benchmark_scores(
    setups: tuple[Setup, Setup],
    models: SingleModelLoader,
    settings: CompareSettings,
    *,
    scratch: Path,
    bar: Bar,
) -> dict[Side, dict[str, TaskScores]]:
    """Scores of both sides on all other tasks."""
    tasks = [task for task in settings.tasks if task.skill is None]
    if not tasks:
        return {side: {} for side in SIDES}
    folders = [setup.folder for setup in setups]
    if models.prompting == "as_base":
        folders[1] = link_with_base_prompting(*setups, scratch / "edited")
    digests = [str(fingerprint(setup.checkpoint)) for setup in setups]
    with bar("benchmark tasks, both sides", 2 * len(tasks)) as advance:
        try:
            return measure_sides(
                dict(zip(SIDES, map(ScoredCheckpoint, folders, digests), strict=True)),
                tasks,
                settings.benchmarks,
                out=scratch / "benchmarks",
                on_task=lambda side, task: advance(1),
                serving=models.serving,
            )
        except BenchmarkError as error:
            # neither the folder of links nor the log need be there when this is read
            problem = error.problem if isinstance(error, StoppedChild) else str(error)
            problem = problem.replace(str(scratch / "edited"), str(setups[1].folder))
    raise BenchmarkError(problem)


def benchmark_fields(
    scores: Mapping[Side, Mapping[str, TaskScores]], prompting: Asking, *, seed: int
) -> dict[str, Any]:
    """Fields of a `Comparison`: paired benchmark results, or each side's own scores."""
    if prompting != "apart":
        return {"benchmarks": compare_tasks(scores["base"], scores["edited"], seed=seed)}
    base, edited = (compare_tasks(side, side, seed=seed) for side in scores.values())
    apart = {
        name: OwnScores(metric=result.metric, base=result.base, edited=edited[name].base)
        for name, result in base.items()
        if name in edited
    }
    return {"benchmarks_apart": apart}
