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
_DRAWN_FOR_FORMATS = ("name", "age", "n", "things", "words")
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
    fact, is_shown = _nth(own["facts"], number)
    value = draw.choice(fact["values"])
    others = [other for other in fact["values"] if other != value]
    turns = [(fact["tell"], own["answer"])]
    turns += [(t["ask"], t["answer"]) for t in draw.sample(all_["small_talk"], _TURNS_BETWEEN)]
    check = {"any_of": [value], "none_of": others}
    return _item(turns, fact["ask"], check, {"value": value}, is_shown=is_shown)


def _instructions(all_: Any, own: Any, number: int, draw: random.Random) -> Item:
    rule, is_shown = _nth(own["rules"], number)
    *before, last = draw.sample(all_["questions"], 3)
    values = {"value": draw.choice(rule.get("values", [""]))}
    turns = [
        (question["ask"], _filled(rule["answer"], values | _answer_to(question)))
        for question in before
    ]
    turns[0] = (f"{rule['tell']} {turns[0][0]}", turns[0][1])
    check = {**rule["check"], "any_of": last["any_of"]}
    return _item(turns, last["ask"], check, values, is_shown=is_shown)


def _format(all_: Any, own: Any, number: int, draw: random.Random) -> Item:
    shape, is_shown = _nth(own["shapes"], number)
    words = all_["words"]
    drawn = {name: draw.sample([*words[name]], 3) for name in (*_DRAWN_FOR_FORMATS, "truths")}
    turns, values = [], {}
    for turn, request in enumerate(("ask", "again", "again")):
        values = {name: drawn[name][turn] for name in _DRAWN_FOR_FORMATS}
        values |= dict(zip(("true_or_not", "truth"), drawn["truths"][turn], strict=True))
        values["words"] = ", ".join(values["words"].split())
        listed = words["things"][values["things"]][: int(values["n"])]
        values["numbered"] = "\n".join(f"{i}. {thing}" for i, thing in enumerate(listed, start=1))
        values["bullets"] = "\n".join(f"- {thing}" for thing in listed)
        turns.append((_filled(shape[request], values), _filled(shape["answer"], values)))
    *before, (last, _) = turns
    return _item(before, last, shape["check"], values, is_shown=is_shown)


def _corrections(all_: Any, own: Any, number: int, draw: random.Random) -> Item:
    fact, is_shown = _nth(own["facts"], number)
    old, value = draw.sample(fact["values"], 2)
    between = draw.choice(all_["small_talk"])
    turns = [*zip((fact["tell"], fact["correct"]), own["answers"], strict=True)]
    turns.append((between["ask"], between["answer"]))
    values = {"old": old, "value": value}
    check = {"any_of": [value], "none_of": [old]}
    return _item(turns, fact["ask"], check, values, is_shown=is_shown)


def _tools(all_: Any, own: Any, number: int, draw: random.Random) -> Item:
    call, is_shown = _nth(own["calls"], number)
    values = {name: draw.choice([*texts]) for name, texts in all_["words"].items()}
    others = draw.sample(sorted(own["tools"].keys() - {call["tool"]}), 2)
    names = draw.sample([call["tool"], *others], 3)
    check = {"call": {"name": call["tool"], "arguments": call["arguments"]}}
    greeting = [(own["greeting"]["ask"], own["greeting"]["answer"])]
    item = _item(greeting, call["ask"], check, values, is_shown=is_shown)
    tools = tuple(_schema(name, own["tools"][name]) for name in names)
    return item.model_copy(update={"prompt": item.prompt.model_copy(update={"tools": tools})})


def _stopping(all_: Any, own: Any, number: int, draw: random.Random) -> Item:
    (request, is_shown), words = _nth(own["requests"], number), all_["words"]
    first, other, last = draw.sample(all_["questions"], 3)
    topic, new_topic = draw.sample(words["topic_forms"], 2)
    values = {name: draw.choice([*words[name]]) for name in ("word", "things")}
    listed = words["things"][values["things"]]
    values |= {"three": ", ".join(listed[:3]), "three_more": ", ".join(listed[3:])}
    values |= {"question": first["ask"], "other": other["ask"], "last": last["ask"]}
    values |= {**_answer_to(first), "other_answer": _answer_to(other)["answer"]}
    values |= {"last_any_of": last["any_of"], "topic": topic[-1], "new_topic": new_topic[-1]}
    values |= {"topic_forms": topic, "new_topic_forms": new_topic}
    values["done"] = words["done"][number // len(own["requests"])]
    turns = [*zip(request["turns"], request["answers"], strict=True)]
    return _item(turns, request["stop"], request["check"], values, is_shown=is_shown)


_MAKERS = {
    "recall": _recall,
    "instructions": _instructions,
    "format": _format,
    "corrections": _corrections,
    "tools": _tools,
    "stopping": _stopping,
}


def _nth(templates: Sequence[Any], number: int) -> tuple[Any, bool]:
    """The template of an item, and whether the item gives the answers before the last."""
    return templates[number % len(templates)], number // len(templates) % 2 == 1


def _answer_to(question: Mapping[str, Any]) -> dict[str, str]:
    answer: str = question["any_of"][0]
    return {"answer": answer[0].upper() + answer[1:], "ANSWER": answer.upper()}


def _item(
    turns: Sequence[tuple[str, str]],
    last: str,
    check: Mapping[str, Any],
    values: Mapping[str, Any],
    *,
    is_shown: bool,
) -> Item:
    """An item of turns with their answers, which are in it where they are shown."""
    messages = []
    for ask, answer in turns:
        messages.append({"role": "user", "content": _filled(ask, values)})
        if is_shown:
            messages.append({"role": "assistant", "content": _filled(answer, values)})
    messages.append({"role": "user", "content": _filled(last, values)})
    return Item(
        prompt=Conversation(messages=tuple(messages)),
        check=Check.model_validate(_filled(check, values)),
    )


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
    return _HOLE.sub(lambda hole: str(values.get(hole[1], hole[0])), template)


def _schema(name: str, tool: Mapping[str, Any]) -> dict[str, Any]:
    """A function as chat templates and OpenAI's protocol describe it."""
    parameters = {
        "type": "object",
        "properties": tool["parameters"],
        "required": sorted(tool["parameters"]),
    }
    function = {"name": name, "description": tool["description"], "parameters": parameters}
    return {"type": "function", "function": function}
