"""What the pipeline tells whoever runs it, while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Advance(Protocol):
    """Hears of work done, and of anything to show beside the bar."""

    def __call__(self, amount: int, *, status: str = "") -> None:
        """So much more is done."""


class Progress(Protocol):
    """A listener: the command line draws bars, a notebook may ignore everything."""

    def stage(self, name: str, *, done: bool) -> None:
        """A stage begins; `done` if its result is there already and it is skipped."""

    def bar(self, label: str, total: int) -> AbstractContextManager[Advance]:
        """A context that yields a function to call with each amount of work done, of `total`."""

    def note(self, text: str) -> None:
        """Something the user should know, that is no error."""


class Silent:
    """Listens to nothing."""

    def stage(self, name: str, *, done: bool) -> None:
        """Nothing."""

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Advance]:
        """Nothing to draw."""

        def advance(amount: int, *, status: str = "") -> None:
            """Nothing."""

        yield advance

    def note(self, text: str) -> None:
        """Nothing."""
