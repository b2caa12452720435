"""The stage that runs lm-eval on both sides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterator.checkpoint import write_text_atomic
from abliterator.pipeline._rollouts import SIDES, folder_of
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Parts, Stage, kept_parts
from abliterator.pipeline._workspace import digest_of
from abliterator.record import Side

if TYPE_CHECKING:
    from abliterator.benchmarks import TaskScores


def _benchmarks_inputs(run: Run) -> Any:
    return {side: _benchmarks_key(run, side) for side in SIDES}


def _benchmarks_key(run: Run, side: Side) -> str:
    return digest_of(
        [
            run.base_digest(),
            run.digest("bake") if side == "edited" else None,
            run.recipe.published()["benchmarks"],
            {task.name: task.digest for task in run.tasks},
            run.dtype,
        ]
    )


def _benchmarks(run: Run) -> tuple[list[Path], Parts]:
    from abliterator.benchmarks import run_tasks

    settings = run.recipe.benchmarks
    paths = {side: run.workspace.work / "benchmarks" / f"{side}.json" for side in SIDES}
    parts: dict[str, str] = {side: _benchmarks_key(run, side) for side in paths}
    if not run.tasks:
        return [], parts
    run.free()
    kept = kept_parts(run, "benchmarks", parts)
    for side in [side for side in SIDES if side not in kept]:
        with run.progress.bar(f"{side} benchmarks", len(run.tasks)) as advance:
            scores = run_tasks(
                folder_of(run, side),
                run.tasks,
                batch_size=settings.batch_size,
                limit=settings.limit,
                chat_template=settings.chat_template,
                num_fewshot=settings.num_fewshot,
                device=run.device,
                dtype=run.dtype,
            )
            advance(len(run.tasks))
        plain = {name: score.model_dump(mode="json") for name, score in scores.items()}
        write_text_atomic(paths[side], json.dumps(plain, indent=1) + "\n")
    return list(paths.values()), parts


def task_scores(run: Run, side: Side) -> dict[str, TaskScores]:
    """Scores of every task on one side; none where no task was run."""
    from abliterator.benchmarks import TaskScores

    path = run.workspace.work / "benchmarks" / f"{side}.json"
    if not run.tasks:
        return {}
    return {k: TaskScores.model_validate(v) for k, v in json.loads(path.read_text()).items()}


BENCHMARKS = Stage("benchmarks", 1, _benchmarks_inputs, _benchmarks)
