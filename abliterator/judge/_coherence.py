"""Whether an answer is language at all: loops, and characters that no writing system of the prompt explains.

    coherence_of("What is tea?", "Tea is tea is tea is tea is tea is tea is tea is tea is tea is tea")
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from typing import Literal

Grade = Literal[0.0, 0.5, 1.0]

MIN_WORDS = 12  # shorter answers repeat themselves by chance

_WORD = re.compile(r"\w+|[^\w\s]")


def coherence_of(prompt: str, answer: str) -> tuple[Grade, tuple[str, ...]]:
    """(coherence, reasons) of an answer that is not empty."""
    grades: list[tuple[Grade, str]] = []
    loop = loop_share(answer)
    if loop > 0.5:
        grades.append((0.0, "repetition loop"))
    elif loop > 0.25:
        grades.append((0.5, "repetition"))
    strange = strange_share(prompt, answer)
    if strange > 0.3:
        grades.append((0.0, "language drift"))
    elif strange > 0.1:
        grades.append((0.5, "some language drift"))
    if not grades:
        return 1.0, ()
    return min(grade for grade, _ in grades), tuple(reason for _, reason in grades)


def loop_share(answer: str) -> float:
    """Share of words inside a 4-gram that was already said three times before."""
    words = _WORD.findall(answer.lower())
    if len(words) < MIN_WORDS:
        return 0.0
    seen: Counter[tuple[str, ...]] = Counter()
    looping = 0
    for start in range(len(words) - 3):
        gram = tuple(words[start : start + 4])
        seen[gram] += 1
        looping += seen[gram] > 3
    return looping / (len(words) - 3)


def strange_share(prompt: str, answer: str) -> float:
    """Share of letters in a script the prompt does not use, and of replacement characters."""
    letters = [c for c in answer if c.isalpha() or c == "�"]
    if not letters:
        return 0.0
    known = {_script(c) for c in prompt if c.isalpha()} | {"LATIN"}
    return sum(c == "�" or _script(c) not in known for c in letters) / len(letters)


def _script(letter: str) -> str:
    return unicodedata.name(letter, "UNKNOWN").partition(" ")[0]
