"""The conversations of the suite, made from templates by a fixed seed."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal, get_args

from abliterator.benchmarks.conversation._grade import Check
from abliterator.files import package_yaml
from abliterator.prompts import Conversation
from abliterator.record import Frozen

Skill = Literal["recall", "instructions", "format", "corrections", "tools", "stopping"]
SKILLS: tuple[Skill, ...] = get_args(Skill)
ITEMS = 20  # of each skill
VERSION = "1"  # of items and grading: raise it with any change of either
_TURNS_BETWEEN = 10
_HOLE = re.compile(r"\{(\w+)(:int)?\}")


class Item(Frozen):
    """One conversation, and what the last answer in it must be."""

    prompt: Conversation
    check: Check

    @property
    def described(self) -> Conversation:
        """The conversation with its tools described by the user, for templates without tools."""
        if not self.prompt.tools:
            return self.prompt
        first, *others = self.prompt.messages
        tools = json.dumps(list(self.prompt.tools), indent=1)
        text = "\n\n".join([_templates()["tools"]["described"], tools, first["content"]])
        return Conversation(messages=({**first, "content": text}, *others))


@cache
def items_of(skill: Skill) -> tuple[Item, ...]:
    """The conversations of a skill, always the same."""
    templates = _templates()
    make = _MAKERS[skill]
    return tuple(
        # a generator for each item, so that a changed template changes its own items alone
        make(templates, templates[skill], number, random.Random(f"{skill} {number}"))
        for number in range(ITEMS)
    )


def max_new_tokens(skill: Skill) -> int:
    """Tokens of an answer in a skill's conversations, at most."""
    tokens: int = _templates()[skill]["max_new_tokens"]
    return tokens


@cache
def _templates() -> dict[str, Any]:
    templates: dict[str, Any] = package_yaml(
        "abliterator.benchmarks.conversation", "templates.yaml"
    )
    return templates


def _recall(all_: Any, own: Any, number: int, draw: random.Random) -> Item:
    fact = _nth(own["facts"], number)
    value = draw.choice(fact["values"])
    others = [other for other in fact["values"] if other != value]
    between = draw.sample(all_["small_talk"], _TURNS_BETWEEN)
    turns = [_filled(fact["tell"], {"value": value}), *between, fact["ask"]]
    return Item(prompt=_conversation(turns), check=Check(any_of=(value,), none_of=tuple(others)))


def _instructions(all_: Any, own: Any, number: int, draw: random.Random) -> Item:
    rule = _nth(own["rules"], number)
    first, second, last = draw.sample(all_["questions"], 3)
    values = {"value": draw.choice(rule.get("values", [""]))}
    turns = [f"{_filled(rule['tell'], values)} {first['ask']}", second["ask"], last["ask"]]
    return _item(turns, {**rule["check"], "any_of": last["any_of"]}, values)


def _format(all_: Any, own: Any, number: int, draw: random.Random) -> Item:
    shape, words = _nth(own["shapes"], number), all_["words"]
    turns, values = [], {}
    for request, truth in zip(
        ("ask", "again", "again"), draw.sample(words["truths"], 3), strict=True
    ):
        values = {name: draw.choice(words[name]) for name in ("name", "age", "n", "things")}
        listed = ", ".join(draw.choice(words["words"]).split())
        values |= {"words": listed, "true_or_not": truth[0], "truth": truth[1]}
        turns.append(_filled(shape[request], values))
    return _item(turns, shape["check"], values)


def _corrections(all_: Any, own: Any, number: int, draw: random.Random) -> Item:
    fact = _nth(own["facts"], number)
    old, value = draw.sample(fact["values"], 2)
    between = draw.choice(all_["small_talk"])
    turns = [fact["tell"], fact["correct"], between, fact["ask"]]
    values = {"old": old, "value": value}
    return _item(turns, {"any_of": ["{value}"], "none_of": ["{old}"]}, values)


def _tools(all_: Any, own: Any, number: int, draw: random.Random) -> Item:
    call = _nth(own["calls"], number)
    values = {name: draw.choice(texts) for name, texts in all_["words"].items() if name != "truths"}
    others = draw.sample(sorted(own["tools"].keys() - {call["tool"]}), 2)
    names = draw.sample([call["tool"], *others], 3)
    check = {"call": {"name": call["tool"], "arguments": call["arguments"]}}
    item = _item(["Hello! Can you help me with a few things?", call["ask"]], check, values)
    tools = tuple(_schema(name, own["tools"][name]) for name in names)
    return item.model_copy(update={"prompt": item.prompt.model_copy(update={"tools": tools})})


def _stopping(all_: Any, own: Any, number: int, draw: random.Random) -> Item:
    request, words = _nth(own["requests"], number), all_["words"]
    first, other, last = draw.sample(all_["questions"], 3)
    topic, new_topic = draw.sample(words["topic_forms"], 2)
    values = {name: draw.choice(words[name]) for name in ("word", "things")}
    values |= {"question": first["ask"], "other": other["ask"], "last": last["ask"]}
    values |= {"last_any_of": last["any_of"], "topic": topic[-1], "new_topic": new_topic[-1]}
    values |= {"topic_forms": topic, "new_topic_forms": new_topic}
    values["done"] = _nth(words["done"], number // len(own["requests"]))
    return _item([*request["turns"], request["stop"]], request["check"], values)


_MAKERS = {
    "recall": _recall,
    "instructions": _instructions,
    "format": _format,
    "corrections": _corrections,
    "tools": _tools,
    "stopping": _stopping,
}


def _nth(templates: Sequence[Any], number: int) -> Any:
    return templates[number % len(templates)]


def _item(turns: Sequence[str], check: Mapping[str, Any], values: Mapping[str, Any]) -> Item:
    prompt = _conversation([_filled(turn, values) for turn in turns])
    return Item(prompt=prompt, check=Check.model_validate(_filled(check, values)))


def _conversation(turns: Sequence[str]) -> Conversation:
    return Conversation(messages=tuple({"role": "user", "content": turn} for turn in turns))


def _filled(template: Any, values: Mapping[str, Any]) -> Any:
    """The template with its holes filled; one that is a hole alone becomes the value itself."""
    if isinstance(template, dict):
        return {key: _filled(part, values) for key, part in template.items()}
    if isinstance(template, list):
        return [_filled(part, values) for part in template]
    if not isinstance(template, str):
        return template
    if hole := _HOLE.fullmatch(template):
        value = values[hole[1]]
        return int(value) if hole[2] else value
    return _HOLE.sub(lambda hole: str(values[hole[1]]), template)


def _schema(name: str, tool: Mapping[str, Any]) -> dict[str, Any]:
    """A function as chat templates and OpenAI's protocol describe it."""
    parameters = {
        "type": "object",
        "properties": tool["parameters"],
        "required": sorted(tool["parameters"]),
    }
    function = {"name": name, "description": tool["description"], "parameters": parameters}
    return {"type": "function", "function": function}
