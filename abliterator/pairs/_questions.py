"""The requests to the model and the parsing of its replies: pairs to write, requests to sort."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, Literal, NamedTuple

import yaml

from abliterator.recipe import PairsSpec
from abliterator.server import (
    InvalidReply,
    Prompt,
    Request,
    delimiter,
    filled,
    load_prompt,
    neutralize,
    objects,
    without_thinking,
)

Side = Literal["target", "contrast"]
SIDES: tuple[Side, Side] = ("target", "contrast")
MAX_EXISTING = 40  # latest requests of a category that a request for further pairs lists


class Candidate(NamedTuple):
    """Two requests written by the model, each on one line."""

    target: str
    contrast: str


def pairs_prompt() -> Prompt:
    """The prompt file of this package."""
    return load_prompt("pairs", "prompt.yaml")


@cache
def _schema(name: str) -> dict[str, Any]:
    raw = files("abliterator.pairs").joinpath("schemas.yaml").read_bytes()
    schema: dict[str, Any] = yaml.safe_load(raw)[name]
    return schema


def writing_request(
    spec: PairsSpec, category: str, existing: Sequence[str], *, call: int, attempt: int
) -> Request:
    """The request to write pairs of one category; every call has a text of its own."""
    prompt = pairs_prompt()
    examples = [f'- "{e.target}" / "{e.contrast}"' for e in spec.examples]
    latest = [f"- {neutralize(request)}" for request in existing[-MAX_EXISTING:]]
    places = {
        "behaviour": spec.behaviour,
        "target": spec.target,
        "contrast": spec.contrast,
        "category": f"{category}: {spec.categories[category]}",
        "language": spec.language,
        "examples": _listed(prompt.texts["examples"], "pairs", examples),
        "existing": _listed(prompt.texts["existing"], "requests", latest),
        "marker": delimiter(prompt.sha256, category, call, attempt),
        "count": str(spec.per_call),
    }
    messages = _messages(prompt.texts["write_system"], filled(prompt.texts["write_item"], places))
    return Request(messages, _schema("pairs"), {**spec.server.parameters, **spec.parameters})


def _listed(text: str, place: str, lines: Sequence[str]) -> str:
    return filled(text, {place: "\n".join(lines)}) if lines else ""


def sorting_request(spec: PairsSpec, request: str, *, attempt: int) -> Request:
    """The request to label one request; it does not state the side that it was written for."""
    prompt = pairs_prompt()
    mark = delimiter(prompt.sha256, request, attempt)
    system = filled(prompt.texts["check_system"], {"first": spec.target, "second": spec.contrast})
    item = filled(prompt.texts["check_item"], {"marker": mark, "request": neutralize(request)})
    return Request(_messages(system, item), _schema("label"), spec.server.parameters)


def _messages(system: str, user: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def read_pairs(reply: str) -> list[Candidate]:
    """The pairs in a reply; entries that are no pair are left out.

    Raises:
        InvalidReply: if there is not one pair.
    """
    pairs = list(_pairs(reply))
    if not pairs:
        raise InvalidReply("no pairs")
    return pairs


def _pairs(reply: str) -> Iterator[Candidate]:
    for value in objects(without_thinking(reply)):
        entries = value.get("pairs", [value])  # some models leave out the outer object
        for entry in entries if isinstance(entries, list) else []:
            texts = entry if isinstance(entry, dict) else {}
            target, contrast = (_line(texts.get(side)) for side in SIDES)
            if target and contrast:
                yield Candidate(target, contrast)


def _line(value: object) -> str:
    """A text on one line; "" for a value that is no text."""
    return " ".join(value.split()) if isinstance(value, str) else ""


def read_side(reply: str) -> Side | None:
    """The side in a reply; None for neither.

    Raises:
        InvalidReply: if there is no label, or more than one.
    """
    labels = {str(v["label"]).strip() for v in objects(without_thinking(reply)) if "label" in v}
    sides: dict[str, Side | None] = {"A": "target", "B": "contrast", "neither": None}
    if len(labels) != 1 or not labels <= sides.keys():
        raise InvalidReply("no label" if not labels else "no single label of the three")
    return sides[labels.pop()]
