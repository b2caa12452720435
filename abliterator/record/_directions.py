"""Figures of the extracted directions: an entry of the record, and work/direction_checks.json."""

from __future__ import annotations

from abliterator.record._measured import Frozen


class ProtectedSet(Frozen):
    """How much of a protected set's own direction is in the behaviour's: |cos| at every layer.

    The first value is that of layer 1. `left_out` is where all other sets are protected and this
    one is not: how well protection reaches what nobody named.
    """

    name: str
    prompts: int
    before: tuple[float, ...]  # as estimated
    protected: tuple[float, ...]  # as removed
    left_out: tuple[float, ...]


class DirectionChecks(Frozen):
    """Figures of the directions at the position that was selected.

    Attributes:
        protected: of each set of `prompts.protect`.
        harmfulness_cosine: at every layer, between the direction at the last token of the user's
            text (harmfulness, arXiv 2507.11878) and that at the last token of the template
            (refusal); where both were captured.
        left_behind: of each direction r_i that was removed one after the other, |r_iᵀ M|: the part
            of what was written along it that strength 1 leaves, 0 of the last; in that order. Where
            gains follow matrices, that of the matrix that keeps most.
    """

    protected: tuple[ProtectedSet, ...] = ()
    harmfulness_cosine: tuple[float, ...] = ()
    left_behind: tuple[float, ...] = ()
