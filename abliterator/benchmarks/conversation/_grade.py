"""Whether an answer is what a check asks for: exact, without a model.

What the checks share: case, typographic quotes, surrounding spaces and marks of emphasis do not
count; words are compared whole. A check on the whole of an answer fails on one that was cut.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from typing import Any, Literal

from abliterator.benchmarks.conversation._calls import Call, calls_in, same_value
from abliterator.record import Frozen

_QUOTES = str.maketrans({**dict.fromkeys("“”„«»", '"'), **dict.fromkeys("‘’‚", "'")})
_EMPHASIS = "*_`"
_FENCED = re.compile(r"\A```\w*[ \t]*\n(.*?)\n?```\Z", re.DOTALL)
_NUMBERED = re.compile(r"^\s*(\d+)[.)]\s+\S", re.MULTILINE)
_BULLET = re.compile(r"^\s*[-*•]\s+\S", re.MULTILINE)
_GROUPED_DIGITS = re.compile(r"(?<=\d)[,'](?=\d{3}\b)")


class Check(Frozen):
    """What an answer must be; all that is given must hold.

    Attributes:
        any_of: words of which at least one is in it.
        none_of: words of which none is in it.
        exactly: the word that is all of it.
        first: the word that it begins with.
        last: the word that it ends with.
        letters: the case of all its letters.
        words: how many it has.
        quoted: whether it stands in double quotes.
        json_value: the JSON value that is all of it, or all in its code fence.
        numbered: how many lines are numbered, from 1 on, beside lines of text.
        bullets: how many lines are bullet points, beside lines of text.
        listed: words with commas between them that are all of it.
        call: the one call of a tool in it.
    """

    any_of: tuple[str, ...] = ()
    none_of: tuple[str, ...] = ()
    exactly: str | None = None
    first: str | None = None
    last: str | None = None
    letters: Literal["upper"] | None = None
    words: int | None = None
    quoted: bool = False
    json_value: Any = None
    numbered: int | None = None
    bullets: int | None = None
    listed: str | None = None
    call: Call | None = None


def passes(check: Check, answer: str, *, truncated: bool = False) -> bool:
    """Whether an answer is what a check asks for.

    Args:
        check: what is asked for.
        answer: the text without any thinking.
        truncated: whether it was cut at a limit of tokens.
    """
    stated = check.model_dump(exclude_defaults=True)
    text = unicodedata.normalize("NFKC", answer).translate(_QUOTES).strip()
    if not text or (truncated and stated.keys() - _OF_A_PART):
        return False
    return all(_PASSES[name](getattr(check, name), text) for name in stated)


# a part of an answer can pass these
_OF_A_PART = {"any_of", "none_of", "first"}


def _holds(word: str, text: str) -> bool:
    """Whether a word or number stands in a text by itself, not within another."""
    if word.isdigit():
        text = _GROUPED_DIGITS.sub("", text)
    word = re.escape(word)
    if ":" in word:  # a time of day
        word = rf"0?{word}(?:[ap]m)?"
    pattern = rf"(?<!\w)(?<!\d[.,:]){word}(?!\w)(?![.,:]\d)"
    return re.search(pattern, text, re.IGNORECASE) is not None


def _bare_words(text: str) -> list[str]:
    """The words of a text in lower case, without the marks around them."""
    words = (re.sub(r"^[^\w]+|[^\w]+$", "", word) for word in text.replace("_", " ").split())
    return [word.casefold() for word in words if word]


def _is_word(word: str, words: list[str]) -> bool:
    return words == [word.casefold()]


def _is_json(value: Any, text: str) -> bool:
    fenced = _FENCED.match(text)
    try:
        found = json.loads(
            fenced[1] if fenced else text, object_pairs_hook=_distinct, parse_constant=_no_json
        )
    except (ValueError, RecursionError):
        return False
    return same_value(value, found)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def _no_json(constant: str) -> None:
    raise ValueError(constant)


def _is_listed(listed: str, text: str) -> bool:
    """Whether the text is these words with commas between them; a full stop may end it."""
    expected = [word.strip().casefold() for word in listed.split(",")]
    parts = text.strip(_EMPHASIS + '"').removesuffix(".").split(",")
    return [part.strip().casefold() for part in parts] == expected


def _is_upper(text: str) -> bool:
    return text.upper() == text and any(character.isalpha() for character in text)


def _is_quoted(text: str) -> bool:
    text = text.strip(_EMPHASIS)
    return len(text) > 2 and text[0] == text[-1] == '"' and '"' not in text[1:-1]


_PASSES: dict[str, Callable[[Any, str], bool]] = {
    "any_of": lambda words, text: any(_holds(word, text) for word in words),
    "none_of": lambda words, text: not any(_holds(word, text) for word in words),
    "exactly": lambda word, text: _is_word(word, _bare_words(text)),
    "first": lambda word, text: _is_word(word, _bare_words(text)[:1]),
    "last": lambda word, text: _is_word(word, _bare_words(text)[-1:]),
    "letters": lambda case, text: _is_upper(text),
    "words": lambda n, text: len(_bare_words(text)) == n,
    "quoted": lambda _, text: _is_quoted(text),
    "json_value": _is_json,
    "numbered": lambda n, text: [int(i) for i in _NUMBERED.findall(text)] == [*range(1, n + 1)],
    "bullets": lambda n, text: len(_BULLET.findall(text)) == n,
    "listed": _is_listed,
    "call": lambda call, text: calls_in(text) == [call],
}
