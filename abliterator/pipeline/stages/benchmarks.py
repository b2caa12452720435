"""lm-eval and the conversation suite on base and edited.

The stage writes work/benchmarks/SIDE/TASK.json. The recipe's `engine` answers conversations, as it
does rollouts; answers are kept batch by batch while the stage is not done.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterator.files import Journal, digest_of, portable_name
from abliterator.pipeline._kept import KeptAnswers, partial_file
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Artefact, Stage
from abliterator.pipeline._vllm import depends_on, served_by_vllm
from abliterator.pipeline.stages.rollouts import SIDES, folder_of
from abliterator.recipe import BenchmarkEngine, Recipe
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
    from abliterator.benchmarks import (
        is_conversation,
        preset_tasks,
        require_engine,
        resolve_tasks,
    )

    engine = benchmark_engine(recipe)
    # the server of `engine` is checked when it has something to score
    sides: tuple[Side, ...] = SIDES if engine == settings.engine else ()
    tasks = [*preset_tasks(settings.preset), *settings.tasks]
    if not all(map(is_conversation, tasks)):
        require_engine(engine, device, sides=sides)
    return resolve_tasks(tasks, folder=Path.cwd(), revisions=settings.revisions)


def benchmark_engine(recipe: Recipe) -> BenchmarkEngine:
    """What runs the benchmarks: `benchmarks.engine`, or the server of `engine` where it applies."""
    own = recipe.benchmarks.engine
    served = recipe.engine.benchmark_engine(recipe.model)
    return own if served is None or own != BenchmarkEngine() else served


def probe_benchmarks(run: Run) -> None:
    """Checks that the server of the recipe's `engine` can score the base, if it has to.

    Raises:
        BenchmarkError: if it cannot.
    """
    engine = benchmark_engine(run.recipe)
    is_own = engine == run.recipe.benchmarks.engine
    is_running = run.recipe.engine.kind == "server"
    if (
        _by_lm_eval(run)
        and not is_own
        and is_running
        and run.workspace.marker(BENCHMARKS.name) is None
    ):
        from abliterator.benchmarks import require_engine

        require_engine(engine, run.device, sides=SIDES[:1])


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
        *_engine_of_the_recipe(run),
        {task.name: task.digest for task in run.tasks},
        run.dtype,
        *(run.answers_depend_on() if len(_by_lm_eval(run)) < len(run.tasks) else ()),
    ]


def _engine_of_the_recipe(run: Run) -> list[Any]:
    """What the key holds of an engine that is not the section's own."""
    engine = benchmark_engine(run.recipe)
    if engine == run.recipe.benchmarks.engine:
        return []
    plain = engine.model_dump(mode="json", exclude={"api_key_env"})
    return [plain] if run.vllm is None else [plain, *depends_on(run)]


def _side_digest(run: Run, side: Side) -> str:
    by_vllm = _engine_of_the_recipe(run) if run.vllm is not None else []
    bake = run.digest("bake") if side == "edited" else None
    return digest_of([run.base_digest(), bake, *by_vllm])


def _run(run: Run) -> list[Path]:
    for side in SIDES:
        for task in run.tasks:
            if task.skill is not None:
                _hold_conversations(run, side, task)
    if _by_lm_eval(run):
        _run_lm_eval(run, _by_lm_eval(run))
    return [_scores(side, task).path(run) for side in SIDES for task in run.tasks]


def _by_lm_eval(run: Run) -> list[Task]:
    """The tasks that are not of the conversation suite."""
    return [task for task in run.tasks if task.skill is None]


def _hold_conversations(run: Run, side: Side, task: Task) -> None:
    """Lets a side answer the conversations of a task, unless its scores are kept."""
    from abliterator.benchmarks import keep_scores, kept_scores
    from abliterator.evaluation import answers_of, score_conversations

    section, folder = run.recipe.benchmarks, _scores(side, task).path(run).parent
    key = digest_of(
        [
            _side_digest(run, side),
            task.digest,
            task.limit or section.limit,
            section.batch_size,
            run.section("chat"),
            run.dtype,
            *run.answers_depend_on(),
        ]
    )
    if kept_scores(folder, task.name, key) is not None:
        return
    answered = KeptAnswers(
        Journal(partial_file(run, "benchmarks", f"{side}-{task.name}.jsonl", key)), task.name
    )
    with run.progress.bar(
        f"{side} answers, {task.name}", answers_of(task, section) - len(answered)
    ) as advance:
        scores = score_conversations(
            run.answering(folder_of(run, side), side),
            task,
            section,
            run.recipe.chat,
            settings={"dtype": run.dtype, "engine": run.recipe.engine.kind},
            answered=answered,
            on_batch=advance,
        )
    keep_scores(folder, key, scores)


def _run_lm_eval(run: Run, tasks: Sequence[Task]) -> None:
    """Scores both sides on tasks of lm-eval."""
    from abliterator.benchmarks import (
        RunSettings,
        ScoredCheckpoint,
        measure_sides,
        require_engine,
        score_on_workers,
    )

    _note_plain_http(run)
    engine = benchmark_engine(run.recipe)
    by_vllm = run.vllm is not None and engine != run.recipe.benchmarks.engine
    require_engine(engine, run.device, sides=() if by_vllm else SIDES)
    settings = RunSettings(
        section=run.recipe.benchmarks.model_copy(update={"engine": engine}),
        chat=run.recipe.chat,
        **run.options.weights,
        dtype=run.dtype,
        trust_remote_code=run.recipe.trust_remote_code,
    )

    def serving(side: Side) -> AbstractContextManager[str]:
        return served_by_vllm(run, folder_of(run, side), side)

    sides = {
        side: ScoredCheckpoint(folder_of(run, side), _side_digest(run, side)) for side in SIDES
    }
    secrets, out = key_names(run.recipe.published()), run.workspace.work / "benchmarks"
    with run.progress.bar("benchmark tasks, both sides", len(SIDES) * len(tasks)) as advance:

        def on_task(side: Side, task: str) -> None:
            advance(1)

        arguments: dict[str, Any] = {"out": out, "on_task": on_task, "secrets": secrets}
        if run.options.pool is not None and engine.kind == "transformers":
            pool = run.workers(run.options.pool)
            score_on_workers(pool, sides, tasks, settings, **arguments)
            del arguments["on_task"]
        run.free()
        if by_vllm:
            arguments["serving"] = serving
        measure_sides(sides, tasks, settings, **arguments)


def _note_plain_http(run: Run) -> None:
    """Notes that the servers' key, if there is one, would cross a network unencrypted."""
    from abliterator.server import warn_of_plain_http

    engine = benchmark_engine(run.recipe)
    section = "benchmarks.engine" if engine == run.recipe.benchmarks.engine else "engine"
    variable = engine.api_key_env if os.environ.get(engine.api_key_env or "") else None
    for name in ("base_url", "edited_url"):
        url = getattr(engine, name) or ""
        if warning := warn_of_plain_http(url, variable, name=f"{section}.{name}"):
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
