"""Jobs without a model, which workers import from here."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from abliterator.errors import DirectionError
from abliterator.workers import Pool, Resident


@dataclass(frozen=True)
class Square:
    """Squares numbers, after `delay` seconds; writes down each start as a file NAME.PID.

    Attributes:
        folder: of the notes.
        delay: seconds.
        deadly: an item on which the worker dies, as often as `deaths`.
        deaths: -1 is always.
    """

    folder: Path
    delay: float = 0.0
    deadly: int | None = None
    deaths: int = -1

    @contextmanager
    def opened(self, resident: Resident) -> Iterator[Callable[[int], int]]:
        resident.kept["opened"] = resident.kept.get("opened", 0) + 1

        def square(item: int) -> int:
            note = self.folder / f"{item}.{time.monotonic_ns()}.{os.getpid()}"
            note.write_text("", encoding="utf-8")
            if item == self.deadly and self.starts()[item] != self.deaths + 1:
                os._exit(3)
            time.sleep(self.delay)
            return item * item

        yield square

    def starts(self) -> Counter[int]:
        """How often each item was started."""
        return Counter(int(path.name.split(".")[0]) for path in self.folder.iterdir())

    def run(self, pool: Pool, items: Sequence[int]) -> list[int]:
        """The squares."""
        return list(pool.map(pool.number(self), items))


@dataclass(frozen=True)
class Failing:
    """Raises an error that users may see, or one that is a bug."""

    is_bug: bool

    @contextmanager
    def opened(self, resident: Resident) -> Iterator[Callable[[int], None]]:
        def fail(item: int) -> None:
            if self.is_bug:
                raise KeyError("a bug")
            raise DirectionError("Two directions are one.")

        yield fail


@dataclass(frozen=True)
class Seen:
    """What a worker process is like."""

    variable: str

    @contextmanager
    def opened(self, resident: Resident) -> Iterator[Callable[[None], dict[str, object]]]:
        import torch

        seen = {
            "threads": torch.get_num_threads(),
            "variable": os.environ.get(self.variable),
            "pid": os.getpid(),
            "opened": resident.kept.get("opened"),
        }
        yield lambda _: seen
