"""Calls of tools in a reply, in the forms that models are trained to write.

Hermes and Qwen (`<tool_call>{...}</tool_call>`), Llama (`{"name": ..., "parameters": ...}`),
Mistral (`[TOOL_CALLS] [...]`, `name[ARGS]{...}`), gpt-oss (`to=functions.name ... {...}`),
functions in tags (`<function=name>`), and Python calls in brackets (`[name(key="value")]`). Marks
that are control tokens may be missing from a decoded text.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from typing import Any

from abliterator.record import Frozen

_ARGUMENTS = ("arguments", "parameters")
_FUNCTION = re.compile(r"<function=([\w.-]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([\w.-]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_NAMED = re.compile(r"(?:to=functions\.([\w.-]+)[^{}]*|([A-Za-z_][\w.-]*)(?:\[ARGS\])?)\Z")
_OPENING = re.compile(r"[{\[]")
_PYTHON = re.compile(r"\A\s*\[.*\]\s*\Z", re.DOTALL)
_DECODER = json.JSONDecoder()


class Call(Frozen):
    """A call of a tool; two are equal where names and arguments are, whatever their order."""

    name: str
    arguments: dict[str, Any]

    def __eq__(self, other: object) -> bool:
        """Whether the calls are the same; a number is no text, and 1 is not true."""
        return (
            isinstance(other, Call)
            and self.name == other.name
            and same_value(self.arguments, other.arguments)
        )

    __hash__ = None  # type: ignore[assignment]


def same_value(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal; texts but for case and surrounding spaces."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_value(one[k], other[k]) for k in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_value, one, other))
    if isinstance(one, str) and isinstance(other, str):
        return one.strip().casefold() == other.strip().casefold()
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def calls_in(text: str) -> list[Call]:
    """All calls in a reply, in order; none where what looks like a call cannot be read."""
    if tagged := [_of_function(*match.groups()) for match in _FUNCTION.finditer(text)]:
        return [call for call in tagged if call is not None]
    if calls := list(_of_json(text)):
        return calls
    return list(_of_python(text)) if _PYTHON.match(text) else []


def _of_function(name: str, body: str) -> Call | None:
    """The call `<function=name>`, with a JSON object or tagged parameters within."""
    if parameters := _PARAMETER.findall(body):
        return Call(name=name, arguments={key: _value(value) for key, value in parameters})
    try:
        arguments = json.loads(body)
    except ValueError:
        return None
    return Call(name=name, arguments=arguments) if isinstance(arguments, dict) else None


def _value(text: str) -> Any:
    """A parameter's value: JSON where it is some, else text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _of_json(text: str) -> Iterator[Call]:
    """Calls in JSON values wherever they stand, and objects that follow a name."""
    position = end = 0
    while opening := _OPENING.search(text, position):
        start = opening.start()
        try:
            value, position = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            position = start + 1
            continue
        yield from _of_value(value, text[end:start])
        end = position


def _of_value(value: Any, before: str) -> Iterator[Call]:
    if isinstance(value, list):
        for part in value:
            yield from _of_value(part, "")
        return
    if not isinstance(value, dict):
        return
    function = value.get("function", value)
    if isinstance(function, dict) and isinstance(function.get("name"), str):
        arguments = next((function[key] for key in _ARGUMENTS if key in function), None)
        arguments = _value(arguments) if isinstance(arguments, str) else arguments
        if isinstance(arguments, dict):
            yield Call(name=function["name"], arguments=arguments)
    elif named := _NAMED.search(before):
        yield Call(name=named[1] or named[2], arguments=value)


def _of_python(text: str) -> Iterator[Call]:
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in tree.elts if isinstance(tree, ast.List) else ():
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
            try:
                arguments = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
            except ValueError:
                return
            yield Call(name=node.func.id, arguments=arguments)
