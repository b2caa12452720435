"""Base and edited, each scored in a process of its own.

So nothing of one side reaches the other, and memory is given back. What a process finished lies in
a file a task, and is not scored again.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from abliterator.benchmarks._run import run_tasks
from abliterator.benchmarks._scores import TaskScores
from abliterator.benchmarks._settings import Engine, RunSettings
from abliterator.benchmarks._tasks import Task
from abliterator.errors import BenchmarkError, FileError
from abliterator.files import digest_of, read_text, write_text_atomic
from abliterator.record import Side

OUT_OF_MEMORY, NAMED_ERROR = 75, 76  # exit codes of the child

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
) -> dict[Side, Scores]:
    """Scores of every side on every task, with one batch size for all of them.

    Where a side runs out of memory, the batch size is halved for both: what is compared was
    computed alike.

    Args:
        sides: what is compared.
        tasks: from `resolve_tasks`.
        settings: how they are run.
        out: where scores are kept, as SIDE/TASK.json; what is there from the same files, tasks and
            settings is not run again.
        on_task: called with side and task when its scores are there.

    Raises:
        BenchmarkError: if a process fails, or memory is too small for one request at a time.
    """
    while True:
        try:
            return {
                side: _measure_side(side, subject, tasks, settings, out=out, on_task=on_task)
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
    identity = {
        "checkpoint": subject.digest,
        "task": task.model_dump(mode="json"),
        "settings": asdict(settings),
    }
    text = json.dumps(identity, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


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
    write_text_atomic(job_file, json.dumps(job))
    command = [sys.executable, "-m", "abliterator.benchmarks", str(job_file)]
    with (
        log.open("w", encoding="utf-8") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as child,
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
        lines = log.read_text(encoding="utf-8").strip().splitlines() or ["it said nothing"]
        raise BenchmarkError(
            f"lm-eval stopped while it scored {job['folder']} ({lines[-1][:300]}). The whole "
            f"message is in {log}; tasks that were finished are kept."
        )


def main(job_file: Path) -> int:
    """The child: scores one checkpoint as the job file says, a line on stdout for each task."""
    from abliterator.model import is_out_of_memory

    job = json.loads(job_file.read_text(encoding="utf-8"))
    settings = RunSettings(**{**job["settings"], "engine": Engine(**job["settings"]["engine"])})
    out = Path(job["out"])
    to_parent = os.fdopen(os.dup(sys.stdout.fileno()), "w")  # lm-eval's own output is kept away

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
    except BenchmarkError as error:
        print(f"error {json.dumps(str(error))}", file=to_parent, flush=True)
        return NAMED_ERROR
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return OUT_OF_MEMORY
    finally:
        to_parent.close()
    return 0
