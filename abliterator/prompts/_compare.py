"""Equality and similarity of prompts: pure functions on texts.

Same: the texts agree in all but case, spacing, invisible characters, typographic variants, and
punctuation at the ends of words. Alike: the Jaccard index of their sets of letter trigrams. Nearly
equal: alike, or the same words but for one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from abliterator.prompts._conversation import Prompt, user_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NEAR_DUPLICATE = 0.75
"""Similarity from which on two prompts are near duplicates: about one word changed in ten."""

_SAME_WORDS = 4  # words that near duplicates have in common, at least, where one differs
_BLOCK = 1 << 22  # pairs compared at once: 50 MB

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
    near = [
        start + index
        for start, alike in _alike(prompts, list(others), threshold)
        for index in alike.any(axis=1).nonzero()[0].tolist()
    ]
    return near


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
    import numpy as np

    found = set()
    for start, alike in _alike(prompts, prompts, NEAR_DUPLICATE):
        found.update((start + np.tril(alike, start - 1).any(axis=1).nonzero()[0]).tolist())
    seen = set[tuple[int, int]]()
    for index, keys in enumerate(map(_word_keys, prompts)):
        if not seen.isdisjoint(keys):
            found.add(index)
        seen |= keys
    return sorted(found)


def _word_keys(prompt: Prompt) -> set[tuple[int, int]]:
    """A number and a hash of the words, and of all but each one, in any order.

    Two prompts share one if at most one word of each is not in the other.
    """
    words = [hash(word) for word in comparison_key(prompt).split()]
    count, total = len(words), sum(words)
    keys = {(count - 1, total - word) for word in words} | {(count, total)}
    return {key for key in keys if key[0] >= _SAME_WORDS}


def _alike(
    prompts: Sequence[Prompt], others: Sequence[Prompt], threshold: float
) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """Which prompts are alike in letters [rows, others], in blocks, each with its first index."""
    import numpy as np
    from scipy.sparse import csr_array

    columns: dict[str, int] = {}
    sides = []
    for texts in (prompts, others):
        grams = [trigrams(comparison_key(text)) for text in texts]
        ids = [columns.setdefault(gram, len(columns)) for gram_set in grams for gram in gram_set]
        sides.append((ids, np.array([0, *map(len, grams)]).cumsum()))
    rows, held = (
        csr_array((np.ones(len(ids), np.int32), ids, ends), shape=(len(ends) - 1, len(columns)))
        for ids, ends in sides
    )
    sizes, other_sizes = (np.diff(ends) for _, ends in sides)
    block = max(1, _BLOCK // max(1, len(others)))
    for start in range(0, len(prompts), block):
        shared = (rows[start : start + block] @ held.T).toarray()
        either = sizes[start : start + block, None] + other_sizes - shared
        yield start, shared / either >= threshold
