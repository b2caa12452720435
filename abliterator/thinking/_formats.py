"""The table of thinking formats, and the positions of their marks in a text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import yaml


class Mark(NamedTuple):
    """A mark in a text: its position, and the block that it opens or closes."""

    start: int
    end: int
    opens: bool
    block: str  # marks of one block have the same name
    paired: bool = False  # a closing mark means nothing without its opening one
    leads: bool = False  # a mark at the very beginning only


class Channels(NamedTuple):
    """A format of messages in channels."""

    begins: re.Pattern[str]  # in the text of every reply of this format
    control: str  # a control token that only this format has
    header: re.Pattern[str]  # a message's beginning, with a group `channel`, or its end
    answer: str  # the channel of the answer


class Remnant(NamedTuple):
    """Beginnings of a reply decoded without control tokens, and the text before its answer."""

    begins: re.Pattern[str]
    answer: str | None


class Formats(NamedTuple):
    """All formats."""

    pattern: re.Pattern[str]  # matches any mark
    literals: Mapping[str, Mark]  # marks that are no tags, by their text
    wrappers: Sequence[tuple[re.Pattern[str], str]]  # marks that may enclose an answer
    channels: Sequence[Channels]
    remnants: Sequence[Remnant]
    firsts: Sequence[str]  # marks with which a reply begins, or the answer after its thinking

    def marks(self, text: str) -> Iterator[Mark]:
        """Every mark in `text`, in order."""
        for match in self.pattern.finditer(text):
            if name := match["tag"]:
                yield Mark(*match.span(), opens=not match["slash"], block=f"<{name.lower()}>")
            else:
                literal = match["exact"] or match["cased"].lower()
                yield self.literals[literal]._replace(start=match.start(), end=match.end())


@cache
def formats() -> Formats:
    """The table of this package."""
    raw = files("abliterator.thinking").joinpath("formats.yaml").read_text(encoding="utf-8")
    data = yaml.safe_load(raw)
    cased = dict(_in_brackets(data["brackets"], data["tags"]))
    exact = dict(_blocks(data["blocks"]))
    literals = {**cased, **exact}
    openings = [text for text, mark in literals.items() if mark.opens]
    return Formats(
        pattern=re.compile(
            rf"(?P<exact>{_any_of(exact)})|(?i:(?P<cased>{_any_of(cased)}))"
            rf"|(?i:<(?P<slash>/?)(?P<tag>(?:[a-z]+[:_|])?(?:{_any_of(data['tags'])}))\s*>)"
        ),
        literals=literals,
        wrappers=[
            (re.compile(rf"\s*{re.escape(begin)}", re.IGNORECASE), end.lower())
            for begin, end in data["wrappers"]
        ],
        channels=[
            Channels(
                re.compile(entry["begins"]),
                entry["control"],
                re.compile(f"{entry['header']}|{entry['ends']}"),
                entry["answer"],
            )
            for entry in data["channels"]
        ],
        remnants=[
            Remnant(re.compile(rf"\s*{entry['begins']}", re.DOTALL), entry["answer"])
            for entry in data["remnants"]
        ],
        firsts=[
            *openings,
            *(begin for begin, _ in data["wrappers"]),
            *(entry["first"] for entry in data["channels"]),
        ],
    )


def _in_brackets(
    brackets: Iterable[tuple[str, str]], names: Iterable[str]
) -> Iterator[tuple[str, Mark]]:
    """Marks of every name in every pair of brackets; pairs that share an end are one block."""
    for name in names:
        ends: dict[str, str] = {}
        for begin, end in brackets:
            block = ends.setdefault(end.format(name), begin.format(name))
            yield begin.format(name), Mark(0, 0, True, block)
            yield end.format(name), Mark(0, 0, False, block)


def _blocks(blocks: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Mark]]:
    for block in blocks:
        flags = {flag: block.get(flag, False) for flag in ("paired", "leads")}
        for opens, literals in ((True, block["open"]), (False, block["close"])):
            for literal in literals:
                yield literal, Mark(0, 0, opens, block["models"], **flags)


def _any_of(literals: Iterable[str]) -> str:
    """A pattern of any of them, the longest first."""
    return "|".join(map(re.escape, sorted(literals, key=len, reverse=True)))
