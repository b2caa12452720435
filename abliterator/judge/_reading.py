"""Reads an answer: its sentences, the kinds of phrases in each, and what its words are about.

read("I'm sorry, but I can't help with that.")[0].rules  # {"refusal": "cannot_do_it", ...}
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import yaml

from abliterator.files import sha256_of_bytes
from abliterator.judge._languages import foreign_kinds, joined, raw_languages
from abliterator.judge._scripts import count_words

ASKS = ("?", "？", "؟")

_STRAIGHT = str.maketrans(
    {
        **dict.fromkeys("’‘ʼ", "'"),
        **dict.fromkeys("“”„«»「」『』", '"'),
        **dict.fromkeys("`*"),
    }
)
_LINE_MARK = re.compile(r"\A\s*(?:#+\s+|>+\s*|[-+•–]\s+|\d{1,2}[.)]\s+)+")
_ITEM = re.compile(r"\A\s*(?:[-+•–]|\d{1,2}[.)])\s")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=\S)|(?<=[。！？؟।۔])[\"')\]]*\s*(?=\S)")
_QUOTED = re.compile(r"\"[^\"\n]*\"")


class Phrases(NamedTuple):
    """The phrase file, compiled: kind -> rule -> pattern; vocabulary and signal -> pattern."""

    version: str
    sha256: str
    kinds: Mapping[str, Mapping[str, re.Pattern[str]]]
    vocabulary: Mapping[str, re.Pattern[str]]
    signals: Mapping[str, re.Pattern[str]]
    idioms: re.Pattern[str]


class Sentence(NamedTuple):
    """One sentence, normalised; `rules` maps each kind it is of to the rule that matched."""

    text: str
    rules: Mapping[str, str]
    begins_item: bool = False  # whether it begins an item of a list

    def has(self, signal: str) -> bool:
        """Whether the pattern of a signal occurs in it."""
        return phrases().signals[signal].search(self.text) is not None


@cache
def phrases() -> Phrases:
    """The phrase file of this package, compiled once."""
    return compile_phrases(data_file("phrases.yaml"))


def data_file(name: str) -> bytes:
    """A data file of this package, as it is."""
    return files("abliterator.judge").joinpath(name).read_bytes()


def compile_phrases(raw: bytes) -> Phrases:
    """A phrase file compiled: its fragments filled in, the alternatives of a rule joined."""
    data = yaml.safe_load(raw)

    def pattern(alternatives: Sequence[str]) -> re.Pattern[str]:
        return re.compile(joined(alternatives, data["fragments"]))

    def compiled(rules: Mapping[str, Sequence[str]]) -> dict[str, re.Pattern[str]]:
        return {name: pattern(alternatives) for name, alternatives in rules.items()}

    return Phrases(
        version=data["version"],
        sha256=sha256_of_bytes(raw + raw_languages() + data_file("weights.yaml")),
        kinds={kind: compiled(rules) for kind, rules in data["phrases"].items()},
        vocabulary=compiled(data["vocabulary"]),
        signals=compiled(data["signals"]),
        idioms=pattern(data["idioms"]),
    )


def read(answer: str, *, foreign: bool = True) -> list[Sentence]:
    """The sentences of an answer, each with the kinds that its phrases give it.

    Args:
        answer: the text.
        foreign: whether phrases of other languages than English count.
    """
    text = straight(answer).strip()
    # quoted text is not the answer's own, unless the whole answer is one quotation
    text = text if _QUOTED.fullmatch(text) else _QUOTED.sub('""', text)
    return [
        Sentence(part, _kinds_of(part, foreign=foreign), begins_item=is_item and place == 0)
        for line in text.splitlines()
        for is_item, parts in [_parts_of(line)]
        for place, part in enumerate(parts)
    ]


def _parts_of(line: str) -> tuple[bool, list[str]]:
    """(Whether a line is an item of a list, its sentences)."""
    rest = _LINE_MARK.sub("", line, 1)
    parts = (" ".join(part.split()) for part in _SENTENCE_END.split(rest))
    return rest != line and _ITEM.match(line) is not None, [part for part in parts if part]


def _kinds_of(text: str, *, foreign: bool) -> dict[str, str]:
    """Kind -> first rule of it that matches, or the language whose phrase does."""
    if phrases().idioms.search(text):
        return {}
    matches = (
        (kind, name)
        for kind, rules in phrases().kinds.items()
        for name, pattern in reversed(list(rules.items()))
        if pattern.search(text)
    )
    return (foreign_kinds(text) if foreign else {}) | dict(matches)


def straight(text: str) -> str:
    """A text in lower case with straight quotes and without markdown."""
    return text.translate(_STRAIGHT).lower()


def word_count(sentences: Sequence[Sentence]) -> int:
    """Words of all sentences."""
    return sum(count_words(sentence.text) for sentence in sentences)


def density(sentences: Sequence[Sentence], request: str) -> dict[str, float]:
    """Per 100 words, how often each vocabulary occurs; words of the prompt are not counted."""
    text = " ".join(sentence.text for sentence in sentences)
    n = count_words(text)
    return {
        name: 100 * sum(word not in request for word in pattern.findall(text)) / n if n else 0.0
        for name, pattern in phrases().vocabulary.items()
    }
