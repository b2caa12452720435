"""A server that writes pairs by script, and the spec that asks it."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from abliterator.pairs import WORDS, make_pairs
from abliterator.recipe import PairsSpec, ServerSettings

ROOT = Path(__file__).parents[2]
KEY = "sk-Quite0Secret9TestKey"
REQUEST = re.compile(r"(#[0-9a-f]{16}) REQUEST BEGINS\n(.*)\n\1 REQUEST ENDS\n", re.DOTALL)
CATEGORY = re.compile(r"Category of all the pairs: (\w+):")
WANTED = re.compile(r"Write (\d+) new pairs")


def spec(server, *, per_category=8, server_more=None, **more):
    url = server if isinstance(server, str) else server.url
    plain = {"api_key_env": None, "timeout": 5.0, **(server_more or {})}
    return PairsSpec(
        behaviour="It fetches.",
        target="asks to fetch",
        contrast="asks to explain",
        categories={"home": "at home", "garden": "outside", "road": "on the way"},
        per_category=per_category,
        server=ServerSettings(base_url=url, model="small", **plain),
        **more,
    )


def pair(category: str, number: int) -> dict[str, str]:
    """The pair of a number: four words that no other pair has."""
    draw = random.Random(f"{category} {number}")
    words = " ".join("".join(draw.choices("abcdefghijklmnop", k=6)) for _ in range(4))
    return {"target": f"Do fetch {words}.", "contrast": f"Do explain {words}."}


def is_check(body) -> bool:
    return REQUEST.search(body["messages"][1]["content"]) is not None


def sorted_by_its_verb(body) -> str:
    request = REQUEST.search(body["messages"][1]["content"])[2]
    label = "A" if "fetch" in request else "B" if "explain" in request else "neither"
    return json.dumps({"reason": "So it reads.", "label": label})


def well(body) -> str:
    """A model that writes on from what exists already."""
    if is_check(body):
        return sorted_by_its_verb(body)
    user = body["messages"][1]["content"]
    category, count, made = (
        CATEGORY.search(user)[1],
        int(WANTED.search(user)[1]),
        user.count("\n- "),
    )
    return json.dumps({"pairs": [pair(category, made + i) for i in range(count)]})


def made(asked, tmp_path, name="pairs"):
    return make_pairs(asked, cache=tmp_path / f"{name}.sqlite", length=WORDS)
