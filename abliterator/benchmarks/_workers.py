"""Tasks scored by workers, whichever is free, each in a process that the worker starts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from abliterator.benchmarks._settings import RunSettings
from abliterator.benchmarks._subprocess import OutOfMemory, ScoredCheckpoint, measure_side
from abliterator.benchmarks._tasks import Task
from abliterator.devices import release_memory
from abliterator.record import Side
from abliterator.workers import Pool, Resident


class TaskOfSide(NamedTuple):
    """One task on one side."""

    side: Side
    task: Task


@dataclass(frozen=True)
class ScoreTasks:
    """Scores tasks in a worker, on the worker's device, and keeps the scores in `out`."""

    sides: Mapping[Side, ScoredCheckpoint]
    settings: RunSettings
    out: Path
    secrets: frozenset[str]

    @contextmanager
    def opened(self, resident: Resident) -> Iterator[Callable[[TaskOfSide], None]]:
        """What scores one task; the worker's model makes room for that of lm-eval."""
        resident.kept.clear()
        release_memory()

        def score(item: TaskOfSide) -> None:
            try:
                measure_side(
                    item.side,
                    self.sides[item.side],
                    [item.task],
                    self.settings,
                    out=self.out,
                    on_task=lambda side, task: None,
                    secrets=self.secrets,
                    log=f"{item.side}-{item.task.name}",
                    device=resident.device,
                )
            except OutOfMemory:
                return  # `measure_sides` runs it on both sides with smaller batches

        yield score


def score_on_workers(
    pool: Pool,
    sides: Mapping[Side, ScoredCheckpoint],
    tasks: Sequence[Task],
    settings: RunSettings,
    *,
    out: Path,
    on_task: Callable[[Side, str], None],
    secrets: Collection[str] = (),
) -> None:
    """Scores every side on every task, so that `measure_sides` finds the scores in `out`.

    Arguments and errors are those of `measure_sides`; all workers must see `out`.
    """
    whole = {s: c._replace(folder=c.folder.resolve()) for s, c in sides.items()}
    job = pool.number(ScoreTasks(whole, settings, out.resolve(), frozenset(secrets)))
    items = [TaskOfSide(side, task) for side in sides for task in tasks]
    for item, _ in zip(items, pool.map(job, items), strict=True):
        on_task(item.side, item.task.name)
