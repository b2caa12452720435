"""Scripts of letters, and words where a script puts no spaces between them.

script_of("д"), count_words("good day"), count_words("今天天气很好")
# ("CYRILLIC", 2, 3)
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from math import ceil

# Characters a word, on average, in scripts that are written without spaces.
_UNSPACED = {
    r"\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff\u3041-\u30ff": 2,
    r"\u0e01-\u0e4e\u0e81-\u0ede\u1000-\u104f\u1780-\u17d3": 4,  # Thai, Lao, Burmese, Khmer
}
_UNSPACED_RUN = re.compile("|".join(f"([{block}]+)" for block in _UNSPACED))
# \w leaves out the vowel signs of many scripts, which are part of a word all the same.
_SIGNS = (
    r"\u0300-\u036f\u0591-\u05bd\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06dc"
    r"\u0900-\u0963\u0966-\u109f\u1780-\u17d3\u200c\u200d"
)
_WORD = re.compile(rf"[\w{_SIGNS}]+")
# One writing system: Japanese mixes its kana with Chinese characters.
_SAME = {
    "HIRAGANA": "KANA",
    "KATAKANA": "KANA",
    "KATAKANA-HIRAGANA": "KANA",
    "IDEOGRAPHIC": "CJK",
}
# Blocks of symbols and marks whose letters belong to no script.
_NO_SCRIPT = {"MODIFIER", "FEMININE", "MASCULINE", "MATHEMATICAL", "DOUBLE-STRUCK", "UNKNOWN"}


@cache
def script_of(letter: str) -> str:
    """The script of a letter by its Unicode name: LATIN, CYRILLIC, CJK, KANA...; "" for none."""
    plain = unicodedata.normalize("NFKC", letter)[:1]  # full width, mathematical, half-width kana
    name = unicodedata.name(plain, "UNKNOWN")
    first = re.split(r" (?:LETTER|CAPITAL|SMALL|SYLLAB|UNIFIED|VOWEL|CONSONANT|SIGN)", name)[0]
    first = first if first != name else name.partition(" ")[0]
    first = first.partition("-")[0] if first.startswith("CJK") else first
    first = _SAME.get(first, first)
    return "" if first.partition(" ")[0] in _NO_SCRIPT else first


def words(text: str) -> list[str]:
    """The words between spaces and punctuation, vowel signs included."""
    return _WORD.findall(text)


def count_words(text: str) -> int:
    """Number of words of a text with single spaces, estimated where there are no spaces."""
    if _UNSPACED_RUN.search(text) is None:
        return text.count(" ") + 1
    runs = _UNSPACED_RUN.findall(text)
    spaced = len(words(_UNSPACED_RUN.sub(" ", text)))
    return spaced + sum(
        ceil(len(run) / size)
        for groups in runs
        for run, size in zip(groups, _UNSPACED.values(), strict=True)
    )


def units(text: str) -> tuple[list[str], int]:
    """(words, 1), or (words and characters, characters a word) where most words have no spaces."""
    tokens = words(text)
    runs = [(word, match.lastindex) for word in tokens for match in _UNSPACED_RUN.finditer(word)]
    if sum(len(word) for word, _ in runs) <= len(tokens):
        return tokens, 1
    sizes = list(_UNSPACED.values())
    size = max(sizes[(index or 1) - 1] for _, index in runs)
    separated = _UNSPACED_RUN.sub(lambda match: f" {' '.join(match.group())} ", " ".join(tokens))
    return separated.split(), size
