"""Strict reading of a reply that should be one JSON object, for every server and format."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from abliterator.thinking import split_text


class InvalidReply(ValueError):
    """A reply that is not the requested object; the message says why, and quotes nothing of it."""


def without_thinking(reply: str) -> str:
    """The reply after its thinking, which some servers leave in the text.

    Raises:
        InvalidReply: if nothing is left.
    """
    # a reply that begins with its object may quote a tag of thinking inside it
    if reply.lstrip().startswith(("{", "```")):
        return reply
    thinking, text, _ = split_text(reply, is_cut=True)  # an open end is no answer
    if not text.strip():
        raise InvalidReply("only thinking" if thinking.strip() else "blank")
    return text


def without_surrogates(value: Any) -> Any:
    r"""A JSON value whose texts have U+FFFD for half a surrogate pair, which no file can hold.

    JSON allows "\ud800" alone; a model that breaks an emoji in two writes it.
    """
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {without_surrogates(key): without_surrogates(inner) for key, inner in value.items()}
    return [without_surrogates(inner) for inner in value] if isinstance(value, list) else value


def objects(text: str) -> Iterator[Mapping[str, Any]]:
    """Every outermost JSON object in a text; code fences and words around them are skipped.

    An incomplete object is an error: an object quoted before it would otherwise be read as the
    model's own.

    Raises:
        InvalidReply: at broken JSON, a key given twice, or a number that is none.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    start = text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except InvalidReply:
            raise
        except (ValueError, RecursionError):  # ValueError: no JSON, or a number too long
            raise InvalidReply("broken JSON") from None
        if isinstance(value, dict):
            yield without_surrogates(value)
        start = text.find("{", end)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise InvalidReply("a key given twice")
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise InvalidReply(f"the number {name}")
