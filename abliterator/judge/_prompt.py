"""What an LLM judge is sent: the rubric, then one item behind a fence that its text cannot forge.

The fence is a marker made from a digest of the item itself. No text can contain a digest of
itself, the same item always gets the same messages (so a cache can find them), and a retry gets a
fresh marker.

    messages("What is tea?", "A drink.", vote=0, attempt=0)[1]["content"]
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import cache
from importlib.resources import files
from typing import NamedTuple
from unicodedata import category

import yaml

_INVISIBLE = {"Cc", "Cf", "Cs"}  # control, format, half of a surrogate pair
# Chat templates turn these into control tokens of a local server, wherever they stand in a text.
_CONTROL = re.compile(
    r"<(?=[|｜])|(?<=[|｜])>"
    r"|<(?=/?(?:s|bos|eos|pad|unk|think|thinking|start_of_turn|end_of_turn|tool_call)>)"
    r"|<(?=</?SYS>>)|\[(?=/?INST\])",
    re.IGNORECASE,
)
_PLACE = re.compile("<(marker|question|answer)>")


class JudgePrompt(NamedTuple):
    """The prompt file: its texts, and the hash that a record names it by."""

    version: str
    sha256: str
    system: str
    item: str


@cache
def judge_prompt() -> JudgePrompt:
    """The prompt file of this package."""
    raw = files("abliterator.judge").joinpath("prompt.yaml").read_bytes()
    data = yaml.safe_load(raw)
    return JudgePrompt(
        data["version"], hashlib.sha256(raw).hexdigest(), data["system"], data["item"]
    )


def messages(prompt: str, answer: str, *, vote: int, attempt: int) -> list[dict[str, str]]:
    """The conversation that asks for one verdict; the text is blind to whose answer it is."""
    told = judge_prompt()
    filled = {
        "marker": marker(prompt, answer, vote=vote, attempt=attempt),
        "question": defused(prompt),
        "answer": defused(answer),
    }
    # one pass, so that a placeholder inside the judged text stays text
    item = _PLACE.sub(lambda place: filled[place[1]], told.item)
    return [{"role": "system", "content": told.system}, {"role": "user", "content": item}]


def marker(prompt: str, answer: str, *, vote: int, attempt: int) -> str:
    """Sixteen hex digits of the item's digest, different for every vote and attempt."""
    item = json.dumps([judge_prompt().sha256, prompt, answer, vote, attempt])
    return "#" + hashlib.sha256(item.encode()).hexdigest()[:16]


def defused(text: str) -> str:
    """The text with the first character of every control token set apart from the rest of it."""
    text = "".join(c for c in text if c in "\n\t" or category(c) not in _INVISIBLE)
    return _CONTROL.sub(lambda found: f"{found[0]} " if found[0] != ">" else " >", text)
