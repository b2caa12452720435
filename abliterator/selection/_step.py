"""Steps of a selection, as its progress reports them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Step(NamedTuple):
    """A step that is done, and the answers that it took: most of a selection's time."""

    name: str
    answers: int


OnStep = Callable[[Step], None]
