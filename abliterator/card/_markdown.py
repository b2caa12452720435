"""Cells and paragraphs of a card: free text is escaped, numbers have one form."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

import yaml

from abliterator.record import Estimate

LONGEST = 100  # characters of a free-text value; a sha256 has 64, a Hub id at most 96
LOCAL_PATH = re.compile(r"(?:file:|~[^/\\]*[/\\]|\.{1,2}[/\\]|[A-Za-z]:[/\\]|[/\\]).*", re.DOTALL)
NOT_MEASURED = "Not measured"
_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # Unicode's categories


class Markdown(str):
    """Text of our own making: the template prints it as it is, and escapes every other string."""

    __slots__ = ()


def cell(value: object) -> object:
    """The value itself if it is `Markdown` or an integer, else escaped: the template's default."""
    return value if isinstance(value, (int, Markdown)) else escape(value)


def escape(value: object) -> Markdown:
    r"""Makes any value one short Markdown code span that cannot end its line, table cell or span.

    In a code span only a backtick and, in a table, a pipe mean anything. Those two are written as
    `\x60` and `\x7c`, and so is what could fool a reader or a second parser: backslashes, angle
    brackets, braces, ampersands, control characters and all that is neither ASCII nor a letter or
    digit written left to right. Line breaks become spaces, a local path its last name, and what is
    over 100 characters is cut.
    """
    text = " ".join(hide_path(str(value)).split())
    if len(text) > LONGEST:
        text = text[: LONGEST - 1].rstrip() + "…"
    return Markdown(f"`{''.join(map(_visible, text))}`" if text else "(empty)")


def _visible(character: str) -> str:
    if character.isascii():
        harmless = character.isprintable() and character not in "`|\\<>{}&"
        return character if harmless else f"\\x{ord(character):02x}"
    left_to_right = character.isalnum() and unicodedata.bidirectional(character) == "L"
    if left_to_right or character == "…":
        return character
    return character.encode("unicode_escape").decode("ascii")


def last_name(path: str) -> str:
    """The last name of a path of any system."""
    return PurePosixPath(path.replace("\\", "/")).name


def hide_path(text: str) -> str:
    """The last name of an absolute, home or dotted path; any other text unchanged."""
    return last_name(text) if LOCAL_PATH.fullmatch(text) else text


def without_paths(value: Any) -> Any:
    """A copy of plain values (JSON) in which every string that is a local path is its last name."""
    return _with_texts(value, hide_path, in_keys=False)


def without_invisible(value: Any) -> Any:
    """A copy of plain values (JSON) whose texts have no control or format characters but newlines.

    Right-to-left marks and zero-width spaces are format characters.
    """
    return _with_texts(value, _visible_only, in_keys=True)


def _visible_only(text: str) -> str:
    return "".join(c for c in text if c == "\n" or unicodedata.category(c) not in _INVISIBLE)


def _with_texts(value: Any, change: Callable[[str], str], *, in_keys: bool) -> Any:
    """A copy of plain values (JSON) with `change` applied to every string."""
    if isinstance(value, dict):
        return {
            change(key) if in_keys else key: _with_texts(inner, change, in_keys=in_keys)
            for key, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_with_texts(inner, change, in_keys=in_keys) for inner in value]
    return change(value) if isinstance(value, str) else value


def yaml_fence(values: dict[str, Any]) -> Markdown:
    """Values as YAML in a code fence that is longer than any run of backticks in them."""
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=False, width=100)
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markdown(f"{fence}yaml\n{text}{fence}")


def estimate(measured: Estimate | None, form: str = ".3f") -> Markdown:
    """`0.950 [0.888, 0.978], n 98 of 100`; `Not measured` for None."""
    if measured is None:
        return Markdown(NOT_MEASURED)
    return Markdown(f"{interval(measured, form)}, n {measured.counts}")


def interval(measured: Estimate | None, form: str = ".3f") -> Markdown:
    """As `estimate`, for a table that has a column for n; `n/a` for None."""
    if measured is None:
        return Markdown("n/a")
    text: str = number(measured.value, form)
    if measured.low is not None and measured.high is not None:
        text += f" [{number(measured.low, form)}, {number(measured.high, form)}]"
    return Markdown(text)


def two_lines(measured: Estimate | None, form: str = ".3f") -> Markdown:
    """As `interval`, with the interval on a line of its own that does not break: for a phone."""
    value, bracket, bounds = interval(measured, form).partition(" [")
    return Markdown(f"{value}<br>[{bounds.replace(' ', chr(0xA0))}" if bracket else value)


def value(measured: Estimate | None) -> Markdown:
    """A value without its interval; what is withheld says so."""
    return Markdown("withheld") if measured is None else number(measured.value)


def n_of(measured: Estimate | None) -> Markdown:
    """How many an estimate is of, and how many were asked; empty for None."""
    return Markdown("" if measured is None else measured.counts)


def gain(difference: Estimate | None, kl: float | None = None) -> Markdown:
    """A difference with its interval, and the KL of what it was compared with; empty for None."""
    if difference is None:
        return Markdown("")
    against = "" if kl is None else f" at KL {number(kl)}"
    return Markdown(interval(difference, "+.3f") + against)


def probability(p: float | None) -> Markdown:
    """A p-value; `n/a` for None."""
    if p is None:
        return Markdown("n/a")
    return Markdown("< 0.0001" if p < 1e-4 else f"{p:.2g}")


def number(value: float | None, form: str = ".3f", *, absent: str = NOT_MEASURED) -> Markdown:
    """A number without an interval; `absent` for None."""
    if value is None:
        return Markdown(absent)
    text = format(value, form)
    return Markdown("0.000" if text in {"-0.000", "+0.000"} else text)


def or_absent(value: object, absent: str) -> object:
    """The value, or the text `absent` for None."""
    return Markdown(absent) if value is None else value


def uncapitalized(label: str) -> Markdown:
    """A label of ours within a sentence."""
    return Markdown(label[0].lower() + label[1:])


def listed(values: Iterable[object]) -> Markdown:
    """Every value in its order, between commas; `none` for no value."""
    return Markdown(", ".join(map(_plain, values)) or "none")


def settings(values: Mapping[Any, Any]) -> Markdown:
    """Pairs of key and value in the order of the keys, between commas; `none` for no pair."""
    pairs = (f"{escape(key)} {_plain(value)}" for key, value in sorted(values.items()))
    return Markdown(", ".join(pairs) or "none")


def _plain(value: object) -> str:
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, Mapping):
        return f"({settings(value)})"
    return escape(value if isinstance(value, str) else json.dumps(value, default=str))
