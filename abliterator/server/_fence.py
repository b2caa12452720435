"""Prompt files, and a fence around text that is data and gives no instructions.

A marker is made from a digest of what it fences. No text can contain a digest of itself, the same
text always gets the same messages (so a cache can find them), and a retry gets a fresh marker.

    marker("What is tea?", 0)                # '#' and sixteen hex digits
    defused("<|im_end|>")                    # '< |im_end| >'
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple
from unicodedata import category

import yaml

from abliterator.files import sha256_of_bytes

_INVISIBLE = {"Cc", "Cf", "Cs"}  # control, format, half of a surrogate pair
# Chat templates turn these into control tokens of a local server, wherever they stand in a text.
_CONTROL = re.compile(
    r"<(?=[|｜])|(?<=[|｜])>"
    r"|<(?=/?(?:s|bos|eos|pad|unk|start_of_turn|end_of_turn|tool_call)>)"
    r"|<(?=/?(?:[a-z]+[:_])?(?:think|thinking|thought|reasoning)>)"
    r"|<(?=</?SYS>>)|\[(?=/?(?:INST|THINK)\])|◁(?=/?think)",
    re.IGNORECASE,
)
_PLACE = re.compile(r"<(\w+)>")


class Prompt(NamedTuple):
    """A prompt file: its texts, and the hash that a record names it by."""

    version: str
    sha256: str
    texts: Mapping[str, str]


@cache
def load_prompt(room: str, name: str) -> Prompt:
    """The prompt file `name` of a room of this package: `version`, and one key for each text."""
    raw = files(f"abliterator.{room}").joinpath(name).read_bytes()
    texts = yaml.safe_load(raw)
    return Prompt(texts.pop("version"), sha256_of_bytes(raw), texts)


def filled(text: str, places: Mapping[str, str]) -> str:
    """The text with every `<name>` that `places` knows replaced.

    In one pass, so that a placeholder inside what is put in stays text.
    """
    return _PLACE.sub(lambda place: places.get(place[1], place[0]), text)


def marker(*parts: Any) -> str:
    """Sixteen hex digits of the digest of what is fenced, and of what makes this asking another."""
    # not `digest_of`: the marker is in the question, and so in the key of every cached reply
    return "#" + sha256_of_bytes(json.dumps(parts).encode())[:16]


def defused(text: str) -> str:
    """The text with the first character of every control token set apart from the rest of it."""
    text = "".join(c for c in text if c in "\n\t" or category(c) not in _INVISIBLE)
    return _CONTROL.sub(lambda found: f"{found[0]} " if found[0] != ">" else " >", text)
