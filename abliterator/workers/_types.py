"""What a worker is given, what it keeps, and what it answers."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from abliterator import errors
from abliterator.errors import AbliteratorError

RunItem = Callable[[Any], Any]


@dataclass
class Resident:
    """What a worker keeps from one job to the next.

    Attributes:
        device: the device that is this worker's alone, as torch names it.
        threads: threads of the CPU that are this worker's.
        kept: anything that jobs leave for later ones, by name.
    """

    device: str
    threads: int
    kept: dict[str, Any] = field(default_factory=dict)


class Job(Protocol):
    """Work of many items; it is sent to other processes, so it is made of plain data.

    Tensors in it are sent by `pack_tensor`: torch would put them into shared memory.
    """

    def opened(self, resident: Resident) -> AbstractContextManager[RunItem]:
        """What runs one item; open while the worker runs items of this job."""


class NumberedJob(NamedTuple):
    """A job with a number by which a worker knows that it has it already."""

    number: int
    job: Job


class Outcome(NamedTuple):
    """The result of one item, or why there is none.

    Attributes:
        value: the result.
        error: name of a class in `abliterator.errors`, or of another exception.
        message: of the error.
    """

    value: Any = None
    error: str | None = None
    message: str = ""

    def result(self) -> Any:
        """The value.

        Raises:
            AbliteratorError: that the worker met.
            RuntimeError: for any other exception there, with its traceback.
        """
        if self.error is None:
            return self.value
        kind = getattr(errors, self.error, RuntimeError)
        raise kind(self.message)


class WorkerLost(Exception):
    """A worker ended while it ran an item; the message says how."""


class Worker(Protocol):
    """One worker, as the pool sees it. One thread at a time uses it."""

    @property
    def name(self) -> str:
        """Its place, for messages."""

    def wait_ready(self, is_over: Callable[[], bool]) -> bool:
        """Waits until it runs, and starts it again if it ended; False if `is_over` came first."""

    def run(self, job: NumberedJob, item: Any) -> Outcome:
        """Runs one item.

        Raises:
            WorkerLost: if the worker ends meanwhile.
        """

    def close(self) -> None:
        """Ends it at once, whatever it does."""


class JobRunner:
    """Runs items within a worker, and keeps the job of the last one open."""

    def __init__(self, resident: Resident) -> None:
        self._resident, self._open = resident, ExitStack()
        self._number: int | None = None
        self._run_item: RunItem | None = None

    def has(self, number: int) -> bool:
        """Whether the job of this number is open."""
        return self._number == number

    def run(self, number: int, job: Job | None, item: Any) -> Outcome:
        """The outcome of an item of a job, which may be None where `has` is true."""
        try:
            if not self.has(number):
                self.close()
                assert job is not None
                self._run_item = self._open.enter_context(job.opened(self._resident))
                self._number = number
            assert self._run_item is not None
            return Outcome(self._run_item(item))
        except AbliteratorError as error:
            return Outcome(error=_public_name(error), message=str(error))
        except Exception as error:  # noqa: BLE001 - it is raised again where the work was asked for
            return Outcome(error=type(error).__name__, message=traceback.format_exc())

    def close(self) -> None:
        """Closes the open job."""
        self._number = self._run_item = None
        self._open.close()


def _public_name(error: AbliteratorError) -> str:
    """The nearest class of an error that `abliterator.errors` has."""
    return next(kind.__name__ for kind in type(error).__mro__ if hasattr(errors, kind.__name__))
