"""Coherence of an answer: repetition, and letters of scripts that its prompt does not explain.

coherence_of("What is tea?", "Tea is tea is tea is tea is tea is tea is tea is tea is tea is tea")
# Coherence(grade=0.0, reasons=("repetition",))
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from abliterator.judge._scripts import count_words, script_of, units

NO_WORDS, LOOP, DRIFT = "no words", "repetition", "language drift"
LOST = "\ufffd"  # replaces bytes that are no character
GRAM = 4  # words: shorter ones repeat in good prose
FEW_WORDS = 10  # below this hardly anything can repeat
FEW_LETTERS = 12  # below this a foreign letter is a symbol, as in "π"
# Shares of the answer above which it is degraded, and broken. Of 900 sound answers of two large
# models, 95 in 100 repeat fewer than 1 gram in 14; the worst repeats 1 in 4.
LOOPING = (0.25, 0.5)
STRANGE = (0.1, 0.3)

_SENTENCE = re.compile(r"[^.!?。！？؟।۔\n]+")
# One unit of up to 20 characters, ten times in a row or more; rulers and dots are typography.
_RUN = re.compile(r"(?![-=_.*|~#+\s]{10})(.{1,20}?)\1{9,}", re.DOTALL)
# Code repeats names by its nature; a loop inside it hardly ever reaches the closing fence.
_CODE = re.compile(r"```.*?```", re.DOTALL)
_OTHER_LANGUAGE = re.compile(
    r"(?i:translat|language|alphabet|script)"
    r"|\b(?:in|into) [A-Z]\w*(?:ese|ian|ish|ic|ek|ew|di|an|ai)\b"
)


# Special tokens of chat templates; an answer that holds nothing else is empty.
_REMNANT = re.compile(
    r"<\|start_header_id\|>\w*|<(?:\|im_start\||start_of_turn|\|turn)>\w*|<\|[^|<>\n]{0,40}\|?>"
    r"|<｜[^<>\n]{0,40}｜>|</?s>|<(?:bos|eos|pad|unk|sep|cls|mask|end_of_turn|end_of_text|eod|turn\|)>"
    r"|\[/?(?:INST|SYS|PAD|SEP|CLS|UNK|MASK|EOS|BOS)\]|<</?SYS>>|<(?:0x[0-9A-F]{2}|unused\d+)>",
    re.IGNORECASE,
)


class Coherence(NamedTuple):
    """How sound the language is, and what flaws it has."""

    grade: float  # 0, 0.5 or 1
    reasons: tuple[str, ...]


def coherence_of(prompt: str, answer: str) -> Coherence:
    """Grades the language of an answer that is not empty."""
    if not any(character.isalnum() for character in answer):
        return Coherence(0.0, (NO_WORDS,))
    flaws = {
        LOOP: _grade(loop_share(answer), LOOPING),
        DRIFT: _grade(strange_share(prompt, answer), STRANGE),
    }
    return Coherence(min(flaws.values()), tuple(name for name, grade in flaws.items() if grade < 1))


def without_remnants(answer: str) -> str:
    """The answer unchanged; "" (or its spaces) where it holds special tokens only."""
    rest = _REMNANT.sub("", answer)
    return answer if any(character.isalnum() for character in rest) else rest


def _grade(share: float, limits: tuple[float, float]) -> float:
    degraded, broken = limits
    return 0.0 if share > broken else 0.5 if share > degraded else 1.0


def loop_share(answer: str) -> float:
    """Share of an answer that repeats itself: by grams of words, by sentences, or by characters."""
    text = _CODE.sub("", answer.lower()) or answer.lower()
    tokens, size = units(text)
    grams = _grams(tokens, GRAM * size)
    sentences = [" ".join(s.split()) for s in _SENTENCE.findall(text)]
    sentences = [sentence for sentence in sentences if count_words(sentence) >= 3]
    run = sum(len(match.group()) for match in _RUN.finditer(text)) / len(text)
    return max(_repeated(grams), _repeated(sentences), run)


def distinct_share(answer: str) -> float | None:
    """Share of word pairs that are not repeats; None for an answer of fewer than 10 words.

    Where a script has no spaces, a word is as many characters as words of it have on average.
    """
    tokens, size = units(answer.lower())
    if len(tokens) < FEW_WORDS * size:
        return None
    pairs = _grams(tokens, 2 * size)
    return len(set(pairs)) / len(pairs)


def _grams(items: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(items[i : i + size]) for i in range(len(items) - size + 1)]


def _repeated(items: Sequence[Hashable]) -> float:
    """Share of items that repeat an earlier one; 0 for a single repeat, which is no loop."""
    repeats = len(items) - len(set(items))
    return repeats / len(items) if repeats > 1 else 0.0


def strange_share(prompt: str, answer: str) -> float:
    """Share of letters in a script the prompt does not use, and of characters lost in decoding.

    Latin is never strange, nor is any script when the prompt names another language.
    """
    letters = [c for c in answer if c.isalpha() or c == LOST]
    if len(letters) < FEW_LETTERS:
        return 0.0
    lost = letters.count(LOST)
    if _OTHER_LANGUAGE.search(prompt):
        return lost / len(letters)
    expected = {script_of(c) for c in set(prompt) if c.isalpha()} | {"LATIN", ""}
    if expected & {"CJK", "KANA"}:  # Japanese is written in both; a prompt may hold one alone
        expected |= {"CJK", "KANA"}
    strange = sum(
        n for c, n in Counter(letters).items() if c == LOST or script_of(c) not in expected
    )
    return strange / len(letters)
