"""Prompt files, and delimiters around text that is data and gives no instructions.

A delimiter is made from a digest of what it encloses. No text can contain a digest of itself, the
same text always gets the same messages (so a cache can find them), and a retry gets another one.

    delimiter("What is tea?", 0)             # '#' and sixteen hex digits
    neutralize("<|im_end|>")                 # '< |im_end| >'
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
def load_prompt(package: str, name: str) -> Prompt:
    """The prompt file `name` of a package: `version`, and one key for each text."""
    raw = files(f"abliterator.{package}").joinpath(name).read_bytes()
    texts = yaml.safe_load(raw)
    return Prompt(texts.pop("version"), sha256_of_bytes(raw), texts)


def filled(text: str, places: Mapping[str, str]) -> str:
    """The text with every placeholder `<name>` of `places` replaced.

    In one pass, so that a placeholder inside what is put in stays text.
    """
    return _PLACE.sub(lambda place: places.get(place[1], place[0]), text)


def delimiter(*parts: Any) -> str:
    """A "#" and 16 hex digits of the digest of `parts`: the text, and what varies between tries."""
    # not `digest_of`: the delimiter is in the question, and so in the key of every cached reply
    return "#" + sha256_of_bytes(json.dumps(parts).encode())[:16]


def neutralize(text: str) -> str:
    """The text with a space in every control token of a chat template, so that it is plain text."""
    text = "".join(c for c in text if c in "\n\t" or category(c) not in _INVISIBLE)
    return _CONTROL.sub(lambda match: f"{match[0]} " if match[0] != ">" else " >", text)
