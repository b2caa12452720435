"""Progress reports from the pipeline to its caller."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """Advances a progress bar."""

    def __call__(self, amount: int, *, status: str = "") -> None:
        """Adds `amount` to the work done, and shows `status` beside the bar."""


class Progress(Protocol):
    """Receives reports: the command line draws bars, a notebook may ignore them (`Silent`)."""

    def stage(self, name: str, *, done: bool) -> None:
        """Reports that a stage begins; `done` if its result exists and it is skipped."""
        return

    @contextmanager
    def bar(self, label: str, total: int, *, unit: str = "") -> Iterator[Advance]:
        """Yields a function, to be called with each part of `total` that is done.

        `total` is 0 for work of unknown length; `unit` is "B" for bytes.
        """

        def advance(amount: int, *, status: str = "") -> None:
            pass

        yield advance

    def note(self, text: str) -> None:
        """Shows a note to the user that is no error."""
        return


class Silent(Progress):
    """Ignores all reports."""
