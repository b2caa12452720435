"""Errors as lines of a report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from abliterator.files import shown

OK = "ok"


def described(error: BaseException) -> str:
    """An error in one line: its type, and the first line of its message."""
    message = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {message[0]}" if message else type(error).__name__
    return shown(without_home(text))


def outcome(function: Callable[..., object], *arguments: object) -> str:
    """The word "ok" if a call raises nothing, else its error in one line."""
    try:
        function(*arguments)
    except Exception as error:  # noqa: BLE001 - drivers and libraries raise errors of every type
        return described(error)
    return OK


@contextmanager
def noted(faults: list[str], subject: str) -> Iterator[None]:
    """Adds an error of the block to `faults`, in place of raising it."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - a report of faults has to end, whatever they are
        faults.append(f"{subject}: {described(error)}")


def without_home(text: str) -> str:
    """The text with `~` for the user's home folder, whose name a public report need not have."""
    try:
        home = str(Path.home())
    except RuntimeError:  # there is none
        return text
    return text if home == Path(home).anchor else text.replace(home, "~")
