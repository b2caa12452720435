"""Equality and similarity of prompts: pure functions on texts.

Same: the texts agree in all but case, spacing, invisible characters, typographic variants, and
punctuation at the ends of words. Alike: the Jaccard index of their sets of letter trigrams.
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from itertools import chain

from abliterator.prompts._conversation import Prompt, user_text

NEAR_DUPLICATE = 0.75
"""Similarity from which on two prompts are near duplicates: about one word changed in ten."""

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
    """Indices of the prompts that are near duplicates of one of `others`.

    Args:
        prompts: the texts that are checked.
        others: the texts that they are compared with.
        threshold: least Jaccard index of the letter trigrams of two near duplicates.
    """
    other_grams = [trigrams(comparison_key(text)) for text in others]
    holders: defaultdict[str, array[int]] = defaultdict(lambda: array("l"))
    for index, grams in enumerate(other_grams):
        for gram in grams:
            holders[gram].append(index)

    def is_near(grams: frozenset[str]) -> bool:
        lists = sorted((holders[gram] for gram in grams if gram in holders), key=len)
        # a text that shares enough trigrams has one of the rarest: only so many may be missing
        least = threshold * len(grams)
        rare = lists[: max(len(lists) - int(least) + 1, 0)]
        candidates = Counter(chain.from_iterable(rare))
        return any(similarity(grams, other_grams[index]) >= threshold for index in candidates)

    keys = (trigrams(comparison_key(text)) for text in prompts)
    return [index for index, grams in enumerate(keys) if is_near(grams)]
