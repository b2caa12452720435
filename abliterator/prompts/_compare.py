"""Equality and similarity of prompts: pure functions on texts.

Same: the texts agree in all but case, spacing, invisible characters, typographic variants, and
punctuation at the ends of words. Alike: the Jaccard index of their sets of letter trigrams. Nearly
equal: alike, or the same words but for one.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from itertools import chain
from math import ceil

from abliterator.prompts._conversation import Prompt, user_text

NEAR_DUPLICATE = 0.75
"""Similarity from which on two prompts are near duplicates: about one word changed in ten."""

NEAR_WORDS = 4
"""Words that near duplicates have in common, at least, where one differs."""

# Default_Ignorable_Code_Point of Unicode (soft hyphen, zero-width and bidirectional characters,
# variation selectors, tags), and the controls that are no whitespace.
_INVISIBLE = re.compile(
    "[\\x00-\\x08\\x0e-\\x1b\\x7f-\\x84\\x86-\\x9f"
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_VARIANTS = str.maketrans(
    {
        **dict.fromkeys("‘’‚‛ʼʹ′‵‹›`´", "'"),
        **dict.fromkeys("“”„‟″‶«»〝〞〟", '"'),
        **dict.fromkeys("‐‑‒–—―−﹘﹣", "-"),
    }
)
_MEANS_SOMETHING = frozenset("#%&*/@\\§¶†‡")  # punctuation by its category alone: C# is not C
_NO_WORD = re.compile(r"[^\w\s]+")


def normalised(prompt: Prompt) -> str:
    """The spelling that decides the side of a split: NFKC, case folded, whitespace collapsed."""
    return " ".join(unicodedata.normalize("NFKC", user_text(prompt)).casefold().split())


def comparison_key(prompt: Prompt) -> str:
    """The form in which prompts are compared: equal for two prompts that are the same.

    Of a conversation all that the user says is compared.

    NFKC, case folded, without invisible characters; quotes, apostrophes and dashes in one variant
    each; punctuation at the ends of words removed, whitespace collapsed. A prompt of punctuation
    alone keeps it. Words, their order, numbers, accents and symbols (C++, $5, -5) all count.
    """
    visible = _INVISIBLE.sub("", user_text(prompt)).translate(_VARIANTS)
    for _ in range(2):  # normal forms hold variants and invisible characters of their own
        visible = _INVISIBLE.sub("", normalised(visible).translate(_VARIANTS))
    words = filter(None, map(_bare, visible.split()))
    return " ".join(words) or visible


def _bare(word: str) -> str:
    """A word without the punctuation at its ends; a dash before something may be a minus."""
    start, end = 0, len(word)
    while start < end and _is_mark(word[start]) and word[start] != "-":
        start += 1
    while start < end and _is_mark(word[end - 1]):
        end -= 1
    return word[start:end]


def _is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("P") and character not in _MEANS_SOMETHING


def trigrams(text: str) -> frozenset[str]:
    """The letter trigrams of a normalised text, without its punctuation."""
    padded = f"  {' '.join(_NO_WORD.sub(' ', text).split())} "
    return frozenset(padded[i : i + 3] for i in range(len(padded) - 2))


def similarity(one: frozenset[str], other: frozenset[str]) -> float:
    """Jaccard index |A ∩ B| / |A ∪ B| of two sets of trigrams."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


def near_duplicates(
    prompts: Sequence[Prompt], others: Collection[Prompt], *, threshold: float = NEAR_DUPLICATE
) -> list[int]:
    """Indices of the prompts whose letters are nearly those of one of `others`.

    Args:
        prompts: the texts that are checked.
        others: the texts that they are compared with.
        threshold: least Jaccard index of the letter trigrams of two near duplicates.
    """
    index = _Trigrams(others, threshold)
    grams = (trigrams(comparison_key(text)) for text in prompts)
    return [number for number, text in enumerate(grams) if index.has_alike(text)]


def nearly_equal(prompts: Sequence[Prompt], others: Collection[Prompt]) -> list[int]:
    """Indices of the prompts that are near duplicates of one of `others`, in letters or in words.

    In words: the same ones in any order, but for one that is changed, added or removed, where at
    least four are the same. Numbers are words. Other words for the same, two changed words of a
    short prompt and translations are not found.
    """
    held = set[tuple[int, int]]().union(*map(_word_keys, others))
    in_words = {i for i, text in enumerate(prompts) if not held.isdisjoint(_word_keys(text))}
    return sorted(in_words.union(near_duplicates(prompts, others)))


def repeats(prompts: Sequence[Prompt]) -> list[int]:
    """Indices of the prompts that are near duplicates, as `nearly_equal`, of an earlier one."""
    index = _Trigrams(prompts, NEAR_DUPLICATE)
    repeated, seen = [], set[tuple[int, int]]()
    for number, text in enumerate(prompts):
        keys = _word_keys(text)
        if not seen.isdisjoint(keys) or index.has_alike(index.grams[number], before=number):
            repeated.append(number)
        seen |= keys
    return repeated


def _word_keys(prompt: Prompt) -> set[tuple[int, int]]:
    """A number and a hash of the words, and of all but each one, in any order.

    Two prompts share one if at most one word of each is not in the other.
    """
    words = [hash(word) for word in comparison_key(prompt).split()]
    count, total = len(words), sum(words)
    keys = {(count - 1, total - word) for word in words} | {(count, total)}
    return {key for key in keys if key[0] >= NEAR_WORDS}


class _Trigrams:
    """Texts, found by the rarest of their letter trigrams.

    Two texts that share enough trigrams share one of the rarest of each: only so many may be
    missing (prefix filtering; Chaudhuri, Ganti & Kaushik 2006, doi:10.1109/ICDE.2006.9).
    """

    def __init__(self, texts: Collection[Prompt], threshold: float) -> None:
        self.threshold = threshold
        self.grams = [trigrams(comparison_key(text)) for text in texts]
        self._frequency = Counter(chain.from_iterable(self.grams))
        self._holders: defaultdict[str, list[int]] = defaultdict(list)
        for number, grams in enumerate(self.grams):
            for gram in self._rarest(grams):
                self._holders[gram].append(number)

    def has_alike(self, grams: frozenset[str], *, before: int | None = None) -> bool:
        """Whether one of the texts, or of those before a number, is alike."""
        holders = (self._holders[gram] for gram in self._rarest(grams) if gram in self._holders)
        return any(
            similarity(grams, self.grams[number]) >= self.threshold
            for number in set(chain.from_iterable(holders))
            if before is None or number < before
        )

    def _rarest(self, grams: frozenset[str]) -> list[str]:
        least = ceil(self.threshold * len(grams) - 1e-9)
        ranked = sorted(grams, key=lambda gram: (self._frequency[gram], gram))
        return ranked[: len(grams) - least + 1]
