"""Which of the written pairs are new, and alike in length; no model is asked for that.

Near duplicates share many letter trigrams (Jaccard index of their sets): words that are bent or
swapped still share most of theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from abliterator.pairs._questions import Candidate
from abliterator.prompts import comparison_key, similarity, trigrams


class Ruler(NamedTuple):
    """How requests are measured, and the name of the unit, as the file gives it."""

    unit: str
    length: Callable[[str], int]


WORDS = Ruler("words", lambda text: len(text.split()))


class Sieve:
    """Lets a pair through if it is unlike all that were let through before."""

    def __init__(self, ruler: Ruler, *, length_gap: int, near_duplicate: float) -> None:
        self._ruler = ruler
        self._length_gap = length_gap
        self._near_duplicate = near_duplicate
        self._exact: set[str] = set()
        self._trigrams: tuple[list[frozenset[str]], ...] = ([], [])  # by side

    def objection(self, candidate: Candidate) -> str | None:
        """Why a pair is dropped; None lets it through, and it is remembered."""
        texts = [comparison_key(text) for text in candidate]
        grams = [trigrams(text) for text in texts]
        lengths = [self._ruler.length(text) for text in candidate]
        if texts[0] == texts[1]:
            return "the two sides are the same"
        if abs(lengths[0] - lengths[1]) > self._length_gap:
            return "the lengths differ"
        if not self._exact.isdisjoint(texts):
            return "duplicate"
        for new, known in zip(grams, self._trigrams, strict=True):
            if any(similarity(new, old) >= self._near_duplicate for old in known):
                return "near duplicate"
        self._exact.update(texts)
        for new, known in zip(grams, self._trigrams, strict=True):
            known.append(new)
        return None
