"""What the pipeline tells whoever runs it, while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """A listener: the command line draws bars, a notebook may ignore everything."""

    def stage(self, name: str, *, done: bool) -> None:
        """A stage begins; `done` if its result is there already and it is skipped."""

    def bar(self, label: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """A context that yields a function to call with each amount of work done, of `total`."""

    def note(self, text: str) -> None:
        """Something the user should know, that is no error."""


class Silent:
    """Listens to nothing."""

    def stage(self, name: str, *, done: bool) -> None:
        """Nothing."""

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """Nothing to draw."""
        yield lambda amount: None

    def note(self, text: str) -> None:
        """Nothing."""
