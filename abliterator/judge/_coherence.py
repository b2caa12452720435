"""Whether an answer is language at all: loops, and characters that its prompt does not explain.

coherence_of("What is tea?", "Tea is tea is tea is tea is tea is tea is tea is tea is tea is tea")
# Coherence(grade=0.0, reasons=("repetition",))
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import NamedTuple

GRAM = 4  # words: shorter ones repeat in good prose
FEW_WORDS = 10  # below this hardly anything can repeat
FEW_LETTERS = 12  # below this a foreign letter is a symbol, as in "π"
# Shares of the answer above which it is degraded, and broken. Of 900 sound answers of two large
# models, 95 in 100 repeat fewer than 1 gram in 14; the worst repeats 1 in 4.
LOOPING = (0.25, 0.5)
STRANGE = (0.1, 0.3)

_WORD = re.compile(r"\w+")
_SENTENCE = re.compile(r"[^.!?\n]+")
# One unit of up to 20 characters, ten times in a row or more; rulers and dots are typography.
_RUN = re.compile(r"(?![-=_.*|~#+\s]{10})(.{1,20}?)\1{9,}", re.DOTALL)
# Code repeats names by its nature; a loop inside it hardly ever reaches the closing fence.
_CODE = re.compile(r"```.*?```", re.DOTALL)
_OTHER_LANGUAGE = re.compile(
    r"(?i:translat|language|alphabet|script)"
    r"|\b(?:in|into) [A-Z]\w*(?:ese|ian|ish|ic|ek|ew|di|an|ai)\b"
)


class Coherence(NamedTuple):
    """How sound the language is, and what is wrong with it."""

    grade: float  # 0, 0.5 or 1
    reasons: tuple[str, ...]


def coherence_of(prompt: str, answer: str) -> Coherence:
    """Grade an answer that is not empty."""
    if not any(character.isalnum() for character in answer):
        return Coherence(0.0, ("no words",))
    flaws = {
        "repetition": _grade(loop_share(answer), LOOPING),
        "language drift": _grade(strange_share(prompt, answer), STRANGE),
    }
    return Coherence(min(flaws.values()), tuple(name for name, g in flaws.items() if g < 1))


def _grade(share: float, limits: tuple[float, float]) -> float:
    degraded, broken = limits
    return 0.0 if share > broken else 0.5 if share > degraded else 1.0


def loop_share(answer: str) -> float:
    """Share of an answer that repeats itself: by grams of words, by sentences, or by characters."""
    text = _CODE.sub("", answer.lower()) or answer.lower()
    words = _WORD.findall(text)
    grams = [tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)]
    sentences = [" ".join(s.split()) for s in _SENTENCE.findall(text) if len(s.split()) >= 3]
    run = sum(len(match.group()) for match in _RUN.finditer(text)) / len(text)
    return max(_repeated(grams), _repeated(sentences), run)


def distinct_share(answer: str) -> float | None:
    """Share of word pairs that are not repeats; None for an answer of fewer than 10 words."""
    words = _WORD.findall(answer.lower())
    if len(words) < FEW_WORDS:
        return None
    pairs = list(pairwise(words))
    return len(set(pairs)) / len(pairs)


def _repeated(items: Sequence[Hashable]) -> float:
    """Share of items that were there before; a single repeat is no loop."""
    again = len(items) - len(set(items))
    return again / len(items) if again > 1 else 0.0


def strange_share(prompt: str, answer: str) -> float:
    """Share of letters in a script the prompt does not use, and of characters lost in decoding.

    Latin is never strange, nor is any script when the prompt speaks of another language.
    """
    letters = [c for c in answer if c.isalpha() or c == "\ufffd"]
    if len(letters) < FEW_LETTERS:
        return 0.0
    lost = letters.count("\ufffd")
    if _OTHER_LANGUAGE.search(prompt):
        return lost / len(letters)
    known = {_script(c) for c in set(prompt) if c.isalpha()} | {"LATIN"}
    strange = sum(n for c, n in Counter(letters).items() if _script(c) not in known)
    return strange / len(letters)


def _script(character: str) -> str:
    """First word of the Unicode name: LATIN, CYRILLIC, CJK, REPLACEMENT..."""
    return unicodedata.name(character, "UNKNOWN").partition(" ")[0]
