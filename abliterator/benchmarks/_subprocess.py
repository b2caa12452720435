"""Scores base and edited, each in a process of its own.

So the sides share no state, and all memory is freed. Finished scores are stored in one file per
task, and are not computed again.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from abliterator.benchmarks._run import run_tasks
from abliterator.benchmarks._scores import TaskScores, keep_scores, kept_scores
from abliterator.benchmarks._settings import RunSettings
from abliterator.benchmarks._tasks import Task
from abliterator.errors import AbliteratorError, BenchmarkError
from abliterator.files import digest_of, portable_name, write_text_atomic
from abliterator.processes import (
    HUB_TOKENS,
    KILLED,
    child_environment,
    child_process,
    python_command,
)
from abliterator.recipe import OPENAI_KEY, BenchmarkEngine
from abliterator.record import Side

OUT_OF_MEMORY, NAMED_ERROR = 75, 76  # exit codes of the child
_LAST_LINES = 5  # of its log, shown in a message

Scores = dict[str, TaskScores]
Serving = Callable[[Side], AbstractContextManager[str | None]]


class ScoredCheckpoint(NamedTuple):
    """The checkpoint of one side, and the digest of its files."""

    folder: Path
    digest: str


def measure_sides(
    sides: Mapping[Side, ScoredCheckpoint],
    tasks: Sequence[Task],
    settings: RunSettings,
    *,
    out: Path,
    on_task: Callable[[Side, str], None] = lambda side, task: None,
    secrets: Collection[str] = (),
    serving: Serving = lambda side: nullcontext(None),
) -> dict[Side, Scores]:
    """Scores of every side on every task, with one batch size for all of them.

    Where a side runs out of memory, the batch size is halved for both: what is compared was
    computed alike. Where kept scores of one side belong to other prompts than those of the other
    side, the task is run again on both.

    Args:
        sides: the checkpoints that are compared.
        tasks: from `resolve_tasks`.
        settings: how they are run.
        out: folder of the scores, as SIDE/TASK.json; scores of the same files, tasks and settings
            are not computed again.
        on_task: called with side and task when its scores are kept.
        secrets: names of environment variables that the processes must not see. Of those that look
            like tokens or keys they get the Hub's where a task may read a dataset there, and
            a server's key where one is the engine.
        serving: starts the server of a side, if it is to be started; yields its address.

    Raises:
        BenchmarkError: if a process fails, or memory is too small for one request at a time.
    """

    def measured() -> dict[Side, Scores]:
        return _measure_alike(
            sides, tasks, settings, out=out, on_task=on_task, secrets=secrets, serving=serving
        )

    scores = measured()
    mismatched = _mismatched_tasks(scores)
    for name in mismatched:
        for side in sides:
            (out / side / portable_name(name, ".json")).unlink()
    return measured() if mismatched else scores


def _measure_alike(
    sides: Mapping[Side, ScoredCheckpoint],
    tasks: Sequence[Task],
    settings: RunSettings,
    **options: Any,
) -> dict[Side, Scores]:
    """Scores of all sides with one batch size: the stated one, halved until it fits."""
    while True:
        try:
            return {
                side: measure_side(side, checkpoint, tasks, settings, **options)
                for side, checkpoint in sides.items()
            }
        except OutOfMemory as error:
            batch_size = settings.section.batch_size
            if batch_size == 1:
                raise BenchmarkError(
                    "The benchmarks do not fit in memory, even one request at a time. Use a "
                    "smaller dtype (`--dtype bfloat16`), a larger device, or fewer examples "
                    "(`benchmarks.num_fewshot`)."
                ) from error
            settings = settings.changed(batch_size=batch_size // 2)


class StoppedChild(BenchmarkError):
    """A process of lm-eval that ended early, with no error of ours.

    `problem` says so without the log's name, for callers that do not keep the log.
    """

    def __init__(self, folder: str, log: Path) -> None:
        written = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = [line.strip()[:300] for line in written if line.strip()][-_LAST_LINES:]
        self.problem = (
            f"lm-eval stopped while it scored {folder}. Its last lines: "
            f"{' | '.join(last) or 'none'}."
        )
        super().__init__(
            f"{self.problem} The whole message is in {log}; tasks that were finished are kept."
        )


def _mismatched_tasks(scores: Mapping[Side, Scores]) -> list[str]:
    """The tasks whose questions differ between sides, as after a change of data or template."""

    def questions(task: TaskScores) -> set[tuple[int, str, str, str]]:
        return {(s.doc_id, s.doc_hash, s.prompt_hash, s.target_hash) for s in task.scores}

    first, *others = scores.values()
    return [
        name
        for name, task in first.items()
        if any(questions(other[name]) != questions(task) for other in others)
    ]


class OutOfMemory(Exception):
    """A process ran out of memory; caught within this package."""


def measure_side(
    side: Side,
    checkpoint: ScoredCheckpoint,
    tasks: Sequence[Task],
    settings: RunSettings,
    *,
    out: Path,
    on_task: Callable[[Side, str], None],
    secrets: Collection[str],
    serving: Serving = lambda side: nullcontext(),
    log: str | None = None,
    device: str | None = None,
) -> Scores:
    """Scores of one side, as `measure_sides` keeps them.

    Args:
        side: its name.
        checkpoint: its files.
        tasks: to be scored.
        settings: how they are run.
        out: folder of the scores.
        on_task: called when the scores of a task are kept.
        secrets: variables that the process must not see.
        serving: see `measure_sides`.
        log: name of the process's log, without ending; that of the side unless given.
        device: where the process computes, in place of what the settings say.

    Raises:
        OutOfMemory: if the process ran out of memory.
        BenchmarkError: if it fails otherwise.
    """
    folder = out / side
    keys = {task.name: _key(checkpoint, task, settings, side) for task in tasks}
    kept = {name: kept for name, key in keys.items() if (kept := kept_scores(folder, name, key))}
    for name in kept:
        on_task(side, name)
    missing = [task for task in tasks if task.name not in kept]
    if missing:
        with serving(side) as url:
            plain = settings.at(url).model_dump(mode="json")
            _run_child(
                {
                    "folder": str(checkpoint.folder),
                    "side": side,
                    "tasks": [task.model_dump(mode="json") for task in missing],
                    "settings": plain | ({"device": device} if device else {}),
                    "keys": keys,
                    "out": str(folder),
                    "secrets": sorted(secrets),
                },
                log=out / portable_name(log or side, ".log"),
                on_task=lambda name: on_task(side, name),
            )
        for task in missing:
            scores = kept_scores(folder, task.name, keys[task.name])
            if scores is None:
                raise RuntimeError(f"{task.name} was not scored, though its process ended well")
            kept[task.name] = scores
    return {task.name: kept[task.name] for task in tasks}


def _key(checkpoint: ScoredCheckpoint, task: Task, settings: RunSettings, side: Side) -> str:
    """Digest of all that the scores of a task depend on."""
    settings = settings.of(task)
    plain = settings.model_dump(
        mode="json",
        exclude={
            "section": {
                **dict.fromkeys(("preset", "tasks", "revisions"), True),  # of other tasks too
                "engine": {"base_url", "edited_url", "api_key_env"},
            },
            **({} if settings.section.chat_template else {"chat": True}),
        },
    )
    return digest_of([checkpoint.digest, task.model_dump(mode="json"), plain, settings.url(side)])


def _run_child(job: Mapping[str, Any], *, log: Path, on_task: Callable[[str], None]) -> None:
    """Runs `main` on the job in a new process; its stderr goes to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    job_file = log.with_suffix(".job.json")
    write_text_atomic(job_file, json.dumps(job, default=str))  # YAML has dates
    command = python_command("-m", "abliterator.benchmarks", str(job_file))
    message = ""
    with (
        log.open("w", encoding="utf-8") as errors,
        child_process(command, env=_environment(job), stderr=errors) as child,
    ):
        for line in child.stdout or ():
            message = line.strip()
            if message.startswith("done "):
                on_task(message.removeprefix("done "))
    job_file.unlink()
    if child.returncode in (OUT_OF_MEMORY, KILLED):
        raise OutOfMemory
    if child.returncode == NAMED_ERROR:
        raise BenchmarkError(json.loads(message.removeprefix("error ")))
    if child.returncode != 0:
        raise StoppedChild(str(job["folder"]), log)


def _environment(job: Mapping[str, Any]) -> dict[str, str]:
    """The child's environment: of all secrets those that its tasks and its engine need."""
    from_hub = any(task["dataset"] or task["spec"]["path"] for task in job["tasks"])
    environment = child_environment(
        keep=HUB_TOKENS if from_hub else frozenset(), drop=job["secrets"]
    )
    engine = BenchmarkEngine.model_validate(job["settings"]["section"]["engine"])
    key = os.environ.get(engine.api_key_env or "")
    # by this name lm-eval's client reads it
    return {**environment, OPENAI_KEY: key} if engine.kind == "server" and key else environment


def main(job_file: Path) -> int:
    """The child process: scores one checkpoint as the job file says.

    Prints a line for each task that is done, and returns the exit code.
    """
    from abliterator.devices import is_out_of_memory

    job = json.loads(job_file.read_text(encoding="utf-8"))
    out = Path(job["out"])
    # messages to the parent have a stream of their own, without lm-eval's output
    to_parent = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")

    def keep(scores: TaskScores) -> None:
        keep_scores(out, job["keys"][scores.task], scores)
        print(f"done {scores.task}", file=to_parent, flush=True)

    try:
        run_tasks(
            Path(job["folder"]),
            [Task.model_validate(task) for task in job["tasks"]],
            RunSettings.model_validate(job["settings"]),
            side=job["side"],
            on_task=keep,
        )
    except AbliteratorError as error:
        print(f"error {json.dumps(str(error))}", file=to_parent, flush=True)
        return NAMED_ERROR
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return OUT_OF_MEMORY
    finally:
        to_parent.close()
    return 0
