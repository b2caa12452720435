"""Progress reports from the pipeline to its caller."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Advance(Protocol):
    """Advances a progress bar."""

    def __call__(self, amount: int, *, status: str = "") -> None:
        """Adds `amount` to the work done, and shows `status` beside the bar."""


class Progress(Protocol):
    """Receives reports: the command line draws bars, a notebook may ignore them."""

    def stage(self, name: str, *, done: bool) -> None:
        """Reports that a stage begins; `done` if its result exists and it is skipped."""

    def bar(self, label: str, total: int) -> AbstractContextManager[Advance]:
        """A context that yields a function, to be called with each part of `total` that is done."""

    def note(self, text: str) -> None:
        """Shows a note to the user that is no error."""


class Silent:
    """Ignores all reports."""

    def stage(self, name: str, *, done: bool) -> None:
        """Does nothing."""

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Advance]:
        """A bar that is not drawn."""

        def advance(amount: int, *, status: str = "") -> None:
            """Does nothing."""

        yield advance

    def note(self, text: str) -> None:
        """Does nothing."""
