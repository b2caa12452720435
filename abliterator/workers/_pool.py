"""Gives the items of a job to whichever worker is free, and returns results in order."""

from __future__ import annotations

import itertools
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from time import monotonic
from typing import Any

from abliterator.errors import WorkerError
from abliterator.workers._types import Job, NumberedJob, Outcome, Worker, WorkerLost

DEATHS = 3  # of workers on one item, after which it is given up
PATIENCE = 300.0  # seconds without any worker, after which a pool is given up
_AHEAD = 4  # items a worker that may be done before their turn: their results are in memory
_POLL = 0.5  # seconds between looks at whether any worker is left


class Pool:
    """Resident workers, and the items that they run.

    Args:
        workers: at least one.
        patience: seconds for which no worker may be there.
    """

    def __init__(self, workers: Sequence[Worker], *, patience: float = PATIENCE) -> None:
        self.workers, self.patience = tuple(workers), patience
        self._numbers = itertools.count()
        self._is_closed = False

    def __len__(self) -> int:
        return len(self.workers)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def number(self, job: Job) -> NumberedJob:
        """A job that several calls of `map` run: each worker opens it once."""
        return NumberedJob(next(self._numbers), job)

    def map(self, job: NumberedJob, items: Sequence[Any]) -> Iterator[Any]:
        """The result of each item, in the order of the items.

        Items that no worker has begun are dropped when the iterator is closed early.

        Raises:
            AbliteratorError: of the first item that fails.
            WorkerError: if workers die on one item three times, or none is left.
        """
        with closing(self.outcomes(job, items)) as outcomes:
            for outcome in outcomes:
                yield outcome.result()

    def outcomes(self, job: NumberedJob, items: Sequence[Any]) -> Generator[Outcome, None, None]:
        """As `map`, but an item that fails has an outcome that says so, and stops no other."""
        dispatch = _Dispatch(self.workers, job, items, self.patience)
        try:
            yield from dispatch.outcomes()
        except (KeyboardInterrupt, SystemExit):  # nobody waits for what is running
            self.close()
            raise
        finally:
            dispatch.end()

    def each(self, job: Job) -> list[Any]:
        """The result of the item None on every worker, at the same time.

        Raises:
            AbliteratorError: of the first that fails.
            WorkerError: if a worker dies three times, or cannot be started.
        """
        numbered = self.number(job)
        dispatches = [_Dispatch([w], numbered, [None], self.patience) for w in self.workers]
        try:
            return [o.result() for dispatch in dispatches for o in dispatch.outcomes()]
        except (KeyboardInterrupt, SystemExit):
            self.close()
            raise
        finally:
            for dispatch in dispatches:
                dispatch.end()

    def close(self) -> None:
        """Ends all workers at once."""
        if not self._is_closed:
            self._is_closed = True
            for worker in self.workers:
                worker.close()


class _Dispatch:
    """The items of one call, a thread for each worker that gives it items, and the results."""

    def __init__(
        self, workers: Sequence[Worker], job: NumberedJob, items: Sequence[Any], patience: float
    ) -> None:
        self._job, self._items, self._patience = job, items, patience
        self._ahead = _AHEAD * len(workers)
        self._changed = threading.Condition()
        self._waiting = deque(range(len(items)))
        self._outcomes: dict[int, Outcome] = {}
        self._deaths: Counter[int] = Counter()
        self._first = 0  # items before it were returned
        self._left = len(items)  # items without an outcome
        self._is_over = False
        self._absent = 0  # workers that do not run at present
        self._threads = ThreadPoolExecutor(len(workers), "worker")
        self._futures: list[Future[None]] = []
        for worker in workers:
            self._futures.append(self._threads.submit(self._serve, worker))

    def outcomes(self) -> Iterator[Outcome]:
        """The outcomes in order, as they come."""
        yield from map(self._outcome, range(len(self._items)))

    def end(self) -> None:
        """Waits for the items that are running, and starts no other."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        self._threads.shutdown(wait=True)

    def _outcome(self, index: int) -> Outcome:
        """The outcome of an item; what comes after it may then run ahead."""
        present = monotonic()
        with self._changed:
            while index not in self._outcomes:
                self._changed.wait(_POLL)
                if self._absent + self._ended_threads() < len(self._futures):
                    present = monotonic()
                elif monotonic() - present > self._patience:
                    raise WorkerError(
                        f"No worker is left, and none came back within {self._patience:g} s. Look "
                        "at the machines of the cluster (`ray status`), and give the same command "
                        "again: it goes on where this one stopped."
                    )
            self._first = index + 1
            self._changed.notify_all()
            return self._outcomes.pop(index)

    def _ended_threads(self) -> int:
        """How many threads have ended; raises what ended one, as a job that cannot be sent."""
        ended = [future for future in self._futures if future.done()]
        for future in ended:
            future.result()
        return len(ended)

    def _serve(self, worker: Worker) -> None:
        """Gives items to a worker until none is left."""
        while self._is_ready(worker) and (index := self._next()) is not None:
            try:
                outcome = worker.run(self._job, self._items[index])
            except WorkerLost as loss:
                self._lose(index, worker, loss)
            else:
                with self._changed:
                    self._outcomes[index] = outcome
                    self._left -= 1
                    self._changed.notify_all()

    def _is_ready(self, worker: Worker) -> bool:
        with self._changed:
            self._absent += 1
        try:
            return worker.wait_ready(self._needs_nobody)
        finally:
            with self._changed:
                self._absent -= 1

    def _needs_nobody(self) -> bool:
        return self._is_over or not self._left

    def _next(self) -> int | None:
        """The next item, once its result may be kept; None when there is no more."""
        with self._changed:
            while not self._needs_nobody():
                if self._waiting and self._waiting[0] < self._first + self._ahead:
                    return self._waiting.popleft()
                self._changed.wait()
            return None

    def _lose(self, index: int, worker: Worker, loss: WorkerLost) -> None:
        """Puts the item of a dead worker first in the queue, or gives it up."""
        with self._changed:
            self._deaths[index] += 1
            if self._deaths[index] < DEATHS:
                self._waiting.appendleft(index)
            else:
                self._left -= 1
                message = self._given_up(index, worker, loss)
                self._outcomes[index] = Outcome(error=WorkerError.__name__, message=message)
            self._changed.notify_all()

    def _given_up(self, index: int, worker: Worker, loss: WorkerLost) -> str:
        return (
            f"Workers died {DEATHS} times on the same part of the work, number {index + 1} of "
            f"{len(self._items)}; the last one was {worker.name} ({loss}). Often that is a lack of "
            "memory: use fewer workers, smaller batches or a smaller dtype (`--dtype bfloat16`). "
            "Nothing that was finished is lost: the same command goes on where this one stopped."
        )
