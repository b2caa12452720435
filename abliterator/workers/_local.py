"""Workers that are processes of this machine."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import TYPE_CHECKING, Any

from abliterator.processes import child_environment
from abliterator.workers._types import JobRunner, NumberedJob, Outcome, Resident, WorkerLost

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

_LAST_LINES = 3  # of a dead worker's stderr, shown in a message
_starting = threading.Lock()


class LocalWorker:
    """A process of this machine, started when it is first needed, and again when it died."""

    def __init__(
        self, number: int, device: str, threads: int, secrets: Collection[str] = ()
    ) -> None:
        self._secrets = secrets
        self.name = f"worker {number} on this machine"
        self._resident = Resident(device, threads)
        self._process: SpawnProcess | None = None
        self._connection: Any = None  # one end of a pipe, whose type each platform has its own of
        self._sent: int | None = None  # number of the job that the process has
        self._is_closed = False

    def wait_ready(self, is_over: Callable[[], bool]) -> bool:
        """Starts the process unless it runs; False if the worker is closed."""
        if not self._is_closed and self._process is None and not is_over():
            self._start()
        return self._process is not None

    def run(self, job: NumberedJob, item: Any) -> Outcome:
        """Runs one item in the process."""
        assert self._connection is not None
        is_new = self._sent != job.number
        try:
            self._connection.send((job.number, job.job if is_new else None, item))
            self._sent = job.number
            outcome: Outcome = self._connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerLost(self._ended()) from error
        return outcome

    def close(self) -> None:
        """Kills the process."""
        self._is_closed = True
        if self._process is not None:
            self._process.kill()
            self._ended()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        is_quiet = logging.root.manager.disable >= logging.WARNING
        process = context.Process(
            target=_serve, args=(theirs, self._resident, is_quiet), daemon=True
        )
        threads = {"OMP_NUM_THREADS": str(self._resident.threads)}
        environment = child_environment(threads, keep=self._secrets)
        with _starting, _start_conditions(environment), _stderr_to(self._log):
            process.start()
        theirs.close()
        self._process, self._sent = process, None

    def _ended(self) -> str:
        """How the process ended; it is forgotten."""
        process, self._process = self._process, None
        if process is None or self._connection is None:  # `close` was there first
            return "it was ended"
        process.join()
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", errors="replace").strip().splitlines()
        for file in (self._log, self._connection):
            file.close()
        code = f"exit code {process.exitcode}"
        return " | ".join([code, *(line.strip()[:300] for line in lines[-_LAST_LINES:])])


@contextmanager
def _start_conditions(environment: Mapping[str, str]) -> Iterator[None]:
    """Within the block, a process starts with this environment, and without the main module.

    `multiprocessing` would run the file of the program again in the new process, which a script
    without a guard does not expect.
    """
    own, main = dict(os.environ), sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        os.environ.clear()
        os.environ.update(environment)
        yield
    finally:
        os.environ.clear()
        os.environ.update(own)
        sys.modules["__main__"] = main


@contextmanager
def _stderr_to(file: Any) -> Iterator[None]:
    """Within the block, a process starts with `file` as its stderr, where the system has such."""
    kept = os.dup(2)
    try:
        os.dup2(file.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _serve(connection: Any, resident: Resident, is_quiet: bool) -> None:
    """The process: runs items until its parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends this
    os.dup2(2, 1)
    if is_quiet:
        logging.disable(logging.WARNING)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    divide_threads(resident.threads)
    runner = JobRunner(resident)
    with suppress(EOFError, OSError):
        while True:
            connection.send(runner.run(*connection.recv()))


def divide_threads(threads: int) -> None:
    """Lets torch compute with so many threads in this process."""
    import torch

    torch.set_num_threads(threads)
