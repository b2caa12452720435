"""Base and edited, each scored in a process of its own.

So nothing of one side reaches the other, and memory is given back. What a process finished lies in
a file a task, and is not scored again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from abliterator.benchmarks._run import run_tasks, uses_chat
from abliterator.benchmarks._scores import TaskScores
from abliterator.benchmarks._settings import Engine, RunSettings
from abliterator.benchmarks._tasks import Task
from abliterator.errors import AbliteratorError, BenchmarkError, FileError
from abliterator.files import digest_of, read_text, write_text_atomic
from abliterator.processes import HUB_TOKENS, child_environment, python_command
from abliterator.record import Side

OUT_OF_MEMORY, NAMED_ERROR = 75, 76  # exit codes of the child
_LAST_LINES = 5  # of its log, that a message has

Scores = dict[str, TaskScores]


class Subject(NamedTuple):
    """One side: its checkpoint, the digest of its files, and the server that serves it, if any."""

    folder: Path
    digest: str
    url: str | None = None


def measure_sides(
    sides: Mapping[Side, Subject],
    tasks: Sequence[Task],
    settings: RunSettings,
    *,
    out: Path,
    on_task: Callable[[Side, str], None] = lambda side, task: None,
    secrets: Collection[str] = (),
) -> dict[Side, Scores]:
    """Scores of every side on every task, with one batch size for all of them.

    Where a side runs out of memory, the batch size is halved for both: what is compared was
    computed alike. Where scores that were kept belong to other prompts than those of the other side
    now, the task is run again on both.

    Args:
        sides: what is compared.
        tasks: from `resolve_tasks`.
        settings: how they are run.
        out: where scores are kept, as SIDE/TASK.json; what is there from the same files, tasks and
            settings is not run again.
        on_task: called with side and task when its scores are there.
        secrets: names of environment variables that the processes must not see. Of what looks like
            a token or a key they get the Hub's where a task may read a dataset there, and
            OPENAI_API_KEY where a server is the engine.

    Raises:
        BenchmarkError: if a process fails, or memory is too small for one request at a time.
    """

    def measured() -> dict[Side, Scores]:
        return _measure_alike(sides, tasks, settings, out=out, on_task=on_task, secrets=secrets)

    scores = measured()
    stale = _asked_otherwise(scores)
    for name in stale:
        for side in sides:
            (out / side / f"{name}.json").unlink()
    return measured() if stale else scores


def _measure_alike(
    sides: Mapping[Side, Subject],
    tasks: Sequence[Task],
    settings: RunSettings,
    **options: Any,
) -> dict[Side, Scores]:
    """Scores of all sides with one batch size: the stated one, halved until it fits."""
    while True:
        try:
            return {
                side: _measure_side(side, subject, tasks, settings, **options)
                for side, subject in sides.items()
            }
        except _OutOfMemory as error:
            if settings.batch_size == 1:
                raise BenchmarkError(
                    "The benchmarks do not fit in memory, even one request at a time. Use a "
                    "smaller dtype (`--dtype bfloat16`), a larger device, or fewer examples "
                    "(`benchmarks.num_fewshot`)."
                ) from error
            settings = replace(settings, batch_size=settings.batch_size // 2)


class StoppedChild(BenchmarkError):
    """A process of lm-eval that ended early, with no error of ours.

    Attributes:
        problem: what happened, with the last lines of the log and without the log's name: for those
            who do not keep the log.
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


def _asked_otherwise(scores: Mapping[Side, Scores]) -> list[str]:
    """The tasks that two sides were not asked alike: data or template were others, earlier."""
    first, *others = scores.values()
    return [
        name
        for name in first
        if any(_questions(other[name]) != _questions(first[name]) for other in others)
    ]


def _questions(scores: TaskScores) -> set[tuple[int, str, str, str]]:
    return {
        (score.doc_id, score.doc_hash, score.prompt_hash, score.target_hash)
        for score in scores.scores
    }


class _OutOfMemory(Exception):
    """A child ran out of memory; never leaves this module."""


def _measure_side(
    side: Side,
    subject: Subject,
    tasks: Sequence[Task],
    settings: RunSettings,
    *,
    out: Path,
    on_task: Callable[[Side, str], None],
    secrets: Collection[str],
) -> Scores:
    settings = replace(settings, engine=replace(settings.engine, url=subject.url))
    folder = out / side
    keys = {task.name: _key(subject, task, settings) for task in tasks}
    kept = {name: kept for name, key in keys.items() if (kept := _read(folder, name, key))}
    for name in kept:
        on_task(side, name)
    missing = [task for task in tasks if task.name not in kept]
    if missing:
        _run_child(
            {
                "folder": str(subject.folder),
                "tasks": [task.model_dump(mode="json") for task in missing],
                "settings": asdict(settings),
                "keys": keys,
                "out": str(folder),
                "secrets": sorted(secrets),
            },
            log=out / f"{side}.log",
            on_task=lambda name: on_task(side, name),
        )
        for task in missing:
            found = _read(folder, task.name, keys[task.name])
            if found is None:
                raise RuntimeError(f"{task.name} was not scored, though its process ended well")
            kept[task.name] = found
    return {task.name: kept[task.name] for task in tasks}


def _key(subject: Subject, task: Task, settings: RunSettings) -> str:
    """All that the scores of a task depend on."""
    if not uses_chat(task, settings):
        settings = replace(settings, system=None, template_kwargs={})
    identity = {
        "checkpoint": subject.digest,
        "task": task.model_dump(mode="json"),
        "settings": asdict(settings),
    }
    return digest_of(identity, default=str)


def _read(folder: Path, task: str, key: str) -> TaskScores | None:
    """Scores that were kept under the key, as they were written; else None."""
    try:
        plain = json.loads(read_text(folder / f"{task}.json"))
        if plain != _sealed(key, plain["scores"]):
            return None
        return TaskScores.model_validate(plain["scores"])
    except (FileError, ValueError, TypeError, KeyError):
        return None


def _sealed(key: str, scores: Any) -> dict[str, Any]:
    """Scores with their key and a digest of both, as they are kept."""
    return {"key": key, "sha256": digest_of([key, scores]), "scores": scores}


def _run_child(job: Mapping[str, Any], *, log: Path, on_task: Callable[[str], None]) -> None:
    """Runs `main` on the job in a new process; its stderr goes to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    job_file = log.with_suffix(".job.json")
    write_text_atomic(job_file, json.dumps(job, default=str))  # YAML has dates
    with (
        log.open("w", encoding="utf-8") as errors,
        subprocess.Popen(
            python_command("-m", "abliterator.benchmarks", str(job_file)),
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            errors="replace",
            env=_environment(job),
        ) as child,
    ):
        try:
            said = ""
            for line in child.stdout or ():
                said = line.strip()
                if said.startswith("done "):
                    on_task(said.removeprefix("done "))
        except BaseException:
            child.kill()
            raise
    job_file.unlink()
    # The kernel ends whoever takes the machine's last memory with SIGKILL.
    if child.returncode in (OUT_OF_MEMORY, -signal.SIGKILL):
        raise _OutOfMemory
    if child.returncode == NAMED_ERROR:
        raise BenchmarkError(json.loads(said.removeprefix("error ")))
    if child.returncode != 0:
        raise StoppedChild(str(job["folder"]), log)


def _environment(job: Mapping[str, Any]) -> dict[str, str]:
    """The child's environment: of all secrets those that its tasks and its engine need."""
    from_hub = any(task["dataset"] or task["spec"]["path"] for task in job["tasks"])
    keep = HUB_TOKENS if from_hub else frozenset()
    if job["settings"]["engine"]["kind"] == "server":
        keep |= {"OPENAI_API_KEY"}
    return child_environment(keep=keep, drop=job["secrets"])


def main(job_file: Path) -> int:
    """The child: scores one checkpoint as the job file says, a line on stdout for each task."""
    from abliterator.model import is_out_of_memory

    job = json.loads(job_file.read_text(encoding="utf-8"))
    settings = RunSettings(**{**job["settings"], "engine": Engine(**job["settings"]["engine"])})
    out = Path(job["out"])
    # lm-eval's own output is kept away
    to_parent = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")

    def keep(scores: TaskScores) -> None:
        plain = _sealed(job["keys"][scores.task], scores.model_dump(mode="json"))
        write_text_atomic(out / f"{scores.task}.json", json.dumps(plain, indent=1) + "\n")
        print(f"done {scores.task}", file=to_parent, flush=True)

    try:
        run_tasks(
            Path(job["folder"]),
            [Task.model_validate(task) for task in job["tasks"]],
            settings,
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
