"""Threads that patch several tensors and several files at once.

Threads suffice: reading, writing, hashing and the calculations of torch run without Python's global
lock, and a process of its own would take longer to import torch than most checkpoints to patch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Event
from types import TracebackType
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

# Files that are written at once. A system writes to one file from one thread at a time, so two are
# faster than one; more would only spread a disk's work.
_FILES = 4

_POLL_S = 0.1  # on Windows, Ctrl-C does not interrupt a wait


class FileThreads:
    """Threads for `patch_file`: some edit tensors, and each of a few copies the rest of one file.

    As a context manager it ends with its block; threads still at work when the block raises stop
    at their next `check`. With a count of 1 there is no thread: all is done by the caller's.

    Args:
        count: how many tensors are edited at once, each in a buffer of its own.
    """

    def __init__(self, count: int = 1) -> None:
        self._stop = Event()
        self._buffers: SimpleQueue[bytearray] = SimpleQueue()
        for _ in range(count):
            self._buffers.put(bytearray())
        self._pools: tuple[ThreadPoolExecutor, ...] = ()
        if count > 1:
            self._pools = (ThreadPoolExecutor(min(count, _FILES)), ThreadPoolExecutor(count))

    def __enter__(self) -> FileThreads:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: object, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stop.set()
        for pool in self._pools:  # those that wait for others first
            pool.shutdown(cancel_futures=kind is not None)

    def check(self) -> None:
        """Raises CancelledError once the block has raised: what a thread does now is of no use."""
        if self._stop.is_set():
            raise CancelledError

    def of_files(self, patch: Callable[[str], _T], files: Sequence[str]) -> Iterator[_T]:
        """Results of `patch` for each file, in their order; several files are worked on at once.

        Raises:
            What `patch` raises, as soon as it does.
        """
        if not self._pools:
            yield from map(patch, files)
            return
        futures = [self._pools[0].submit(patch, file) for file in files]
        for future in futures:
            while not future.done():
                wait(futures, _POLL_S, FIRST_EXCEPTION)
                for other in futures:
                    if other.done():
                        other.result()
            yield future.result()

    def start(
        self, function: Callable[_P, _T], *arguments: _P.args, **options: _P.kwargs
    ) -> Future[_T]:
        """Starts the work on one tensor in a thread; without threads, does it."""
        if self._pools:
            return self._pools[1].submit(function, *arguments, **options)
        future: Future[_T] = Future()
        future.set_result(function(*arguments, **options))
        return future

    @contextmanager
    def buffer(self, size: int) -> Iterator[memoryview]:
        """A buffer of `size` bytes, of as many as there are threads; it holds what it held."""
        held = self._buffers.get()
        if len(held) < size:
            held = bytearray(size)
        try:
            yield memoryview(held)[:size]
        finally:
            self._buffers.put(held)
