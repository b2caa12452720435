"""Splits the text of a reply into thinking and answer, by its marks."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

from abliterator.thinking._formats import Channels, Formats, Mark, formats

_FENCE = re.compile(r"```.*?```", re.DOTALL)
_CONTROL = re.compile(r"<\|[^<>|\s]+\|>(?:\s*assistant\b)?")  # a token, and the role behind it
_UNFINISHED_TAG = re.compile(r"\s*[<\[◁][^\s>\]▷]*\Z")


class Split(NamedTuple):
    """The thinking and the answer of a reply."""

    thinking: str  # the text before the answer, with its marks; "" without thinking
    answer: str  # the text for the user; "" where the reply ends before it
    is_known: bool = True  # whether the end of the thinking is known; if not, `answer` is ""


class Opened(NamedTuple):
    """The state of the prompt's last block or message where a reply begins."""

    block: str | None = None  # the thinking block that the prompt opened
    channel: str | None = None  # the channel of the message that the prompt began
    is_closed: bool = False  # whether the prompt opened thinking and closed it


def split_text(
    text: str,
    *,
    opened: Opened | None = None,
    control: Collection[str] | None = None,
    is_cut: bool = False,
) -> Split:
    """Splits a reply into thinking and answer by the marks in its text.

    Args:
        text: the reply.
        opened: what the prompt left open; None where the prompt is not known.
        control: the control tokens that the reply is made with, which no answer only mentions. None
            for text that may have been decoded without any: then their remnants are looked for.
        is_cut: whether the reply ended at a limit of tokens, perhaps within a mark.
    """
    table, opened_here = formats(), opened or Opened()
    for channels in table.channels:
        is_open = opened_here.channel is not None and opened_here.block == channels.control
        begins = channels.control in (control or ()) or channels.begins.search(text)
        if is_open or begins:
            return _by_channel(text, channels, opened_here.channel if is_open else None)
    if control is None and (split := _by_remnant(text, table)):
        return split
    split = _by_blocks(text, table, opened_here, control or (), is_cut=is_cut)
    if split.thinking or opened_here.is_closed:
        split = _without_wrapper(split, table, is_cut=is_cut)
    return _without_unfinished_mark(split, table) if is_cut else split


def without_marks(thinking: str) -> str:
    """The thinking of a `Split` without the marks of any format."""
    table = formats()
    for channels in table.channels:
        if channels.control in thinking or channels.begins.search(thinking):
            thinking = channels.header.sub("\n", thinking)
    for begin, end in table.wrappers:
        thinking = begin.sub("\n", thinking)
        thinking = re.sub(re.escape(end), "\n", thinking, flags=re.IGNORECASE)
    return _CONTROL.sub("\n", table.pattern.sub("\n", thinking))


def _by_channel(text: str, channels: Channels, channel: str | None) -> Split:
    spans: list[tuple[int, int]] = []
    position = 0
    for header in channels.header.finditer(text):
        if channel == channels.answer:
            spans.append((position, header.start()))
        channel, position = header["channel"], header.end()
    if channel == channels.answer:
        spans.append((position, len(text)))
    return _split_at(text, spans)


def _split_at(text: str, spans: list[tuple[int, int]]) -> Split:
    """The answer is what the spans hold; the rest is thinking and marks."""
    answer = "".join(text[start:end] for start, end in spans)
    bounds = [0, *(bound for span in spans for bound in span), len(text)]
    thinking = "".join(text[a:b] for a, b in zip(bounds[::2], bounds[1::2], strict=True))
    return Split(thinking, answer)


def _by_remnant(text: str, table: Formats) -> Split | None:
    for remnant in table.remnants:
        begin = remnant.begins.match(text)
        if begin is None:
            continue
        if remnant.answer is None:
            return Split(text, "", is_known=False)
        before, mark, answer = text.rpartition(remnant.answer)
        if remnant.answer == begin.group().strip():  # the answer's own channel comes first
            before, mark, answer = text.partition(remnant.answer)
        return Split(before + mark, answer) if mark else Split(text, "")
    return None


def _by_blocks(
    text: str, table: Formats, opened: Opened, control: Collection[str], *, is_cut: bool
) -> Split:
    """Reads the marks in order.

    An opening mark begins a thought where it is a control token, or else leads its line; elsewhere
    an answer mentions it. A closing mark that nothing opened ends a thought that began with the
    reply, unless it is mentioned.
    """
    spans: list[tuple[int, int]] = []
    fences = [match.span() for match in _FENCE.finditer(text)]
    block, position = opened.block, 0
    was_control: bool | None = None  # of the mark that opened the block; None for the prompt's
    mention_ends: dict[str, int] = {}
    for mark in table.marks(text):
        is_control = any(token in text[mark.start : mark.end] for token in control)
        if block is not None:
            if not mark.opens and mark.block == block and not _is_quoted(text, mark, "`"):
                block, position = None, mark.end
        elif mark.opens:
            if is_control or _leads(text, mark, position, fences):
                spans.append((position, mark.start))
                block, was_control = mark.block, is_control
            else:
                mention_ends[mark.block] = mark.end
        elif not mark.paired and (is_control or not _mentions(text, mark, mention_ends, fences)):
            spans, position = [], mark.end
    if block is None:
        spans.append((position, len(text)))
    elif was_control is False and not is_cut and any(text[a:b].strip() for a, b in spans):
        # an opening mark that was never closed, in a whole reply, is part of the answer
        spans[-1] = (spans[-1][0], len(text))
    else:
        spans = []
    return _split_at(text, spans)


def _leads(text: str, mark: Mark, position: int, fences: list[tuple[int, int]]) -> bool:
    """Whether a mark begins its line; a mark of words must begin the reply."""
    if mark.leads:
        return not text[: mark.start].strip()
    line = max(position, text.rfind("\n", 0, mark.start) + 1)
    return not text[line : mark.start].strip() and not _within(mark, fences)


def _mentions(
    text: str, mark: Mark, mention_ends: dict[str, int], fences: list[tuple[int, int]]
) -> bool:
    """Whether an answer only mentions a closing mark: quoted, in code, or beside its pair."""
    opening = mention_ends.get(mark.block)
    after_pair = opening is not None and "\n" not in text[opening : mark.start]
    return after_pair or _within(mark, fences) or _is_quoted(text, mark, "`\"'“‘«")


def _within(mark: Mark, fences: list[tuple[int, int]]) -> bool:
    return any(start <= mark.start < end for start, end in fences)


def _is_quoted(text: str, mark: Mark, quotes: str) -> bool:
    closing = dict(zip("`\"'“‘«", "`\"'”’»", strict=True))
    before, after = text[mark.start - 1 : mark.start], text[mark.end : mark.end + 1]
    return before != "" and before in quotes and closing[before] == after


def _without_wrapper(split: Split, table: Formats, *, is_cut: bool) -> Split:
    """Removes the marks that enclose an answer after its thinking."""
    for begin, end in table.wrappers:
        if (match := begin.match(split.answer)) is None:
            continue
        inner = split.answer[match.end() :]
        stop = inner.lower().find(end)
        if stop < 0:  # perhaps it was cut within the end
            places = range(max(0, len(inner) - len(end)) if is_cut else len(inner), len(inner))
            stop = next((i for i in places if end.startswith(inner[i:].lower())), len(inner))
        return Split(split.thinking + match.group() + inner[stop:], inner[:stop])
    return split


def _without_unfinished_mark(split: Split, table: Formats) -> Split:
    """Counts an answer that is only the beginning of a mark as thinking; for replies cut there."""
    start = split.answer.strip().rstrip("\ufffd")  # the bytes of half a character
    if any(mark.startswith(start) for mark in table.firsts) or _UNFINISHED_TAG.match(start):
        return Split(split.thinking + split.answer, "")
    return split
