"""Rejects pairs that duplicate earlier ones or differ in length; uses no model.

Near duplicates share many letter trigrams (Jaccard index of their sets): words that are inflected
or swapped still share most of theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from abliterator.pairs._questions import Candidate
from abliterator.prompts import comparison_key, similarity, trigrams


class Length(NamedTuple):
    """A measure of a request's length, and the unit's name in the file of pairs."""

    unit: str
    of: Callable[[str], int]


WORDS = Length("words", lambda text: len(text.split()))


class PairFilter:
    """Accepts pairs of similar length that duplicate no accepted pair.

    Args:
        length: how the lengths of the two requests are measured.
        length_gap: by how many units they may differ.
        near_duplicate: Jaccard index of trigrams from which on two requests are duplicates.
    """

    def __init__(self, length: Length, *, length_gap: int, near_duplicate: float) -> None:
        self._length = length
        self._length_gap = length_gap
        self._near_duplicate = near_duplicate
        self._exact: set[str] = set()
        self._trigrams: tuple[list[frozenset[str]], ...] = ([], [])  # by side

    def rejection_reason(self, candidate: Candidate) -> str | None:
        """Why a pair is rejected; None accepts it, and later pairs are compared with it."""
        texts = [comparison_key(text) for text in candidate]
        grams = [trigrams(text) for text in texts]
        lengths = [self._length.of(text) for text in candidate]
        if texts[0] == texts[1]:
            return "the two sides are the same"
        if abs(lengths[0] - lengths[1]) > self._length_gap:
            return "the lengths differ"
        if not self._exact.isdisjoint(texts):
            return "duplicate"
        for new, accepted in zip(grams, self._trigrams, strict=True):
            if any(similarity(new, old) >= self._near_duplicate for old in accepted):
                return "near duplicate"
        self._exact.update(texts)
        for new, accepted in zip(grams, self._trigrams, strict=True):
            accepted.append(new)
        return None
