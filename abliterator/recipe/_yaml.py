"""Reads YAML of recipes; the type of its key decides how a plain scalar is read.

YAML 1.1 and 1.2 read the same letters differently (`no`, `2e-2`, `010`, `1:30`, `2024-01-01`), and
a revision of digits alone is still a text. So a plain scalar that could be more than a text keeps
its letters (`Plain`) until the type of its key is known: `resolve` asks pydantic for that.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

Where = tuple[str | int, ...]

_WHITE = " \t\r\n"  # to yaml; a no-break space is a character like any other
_NULL = re.compile("~|null|Null|NULL|")
_BOOL = re.compile("true|True|TRUE|false|False|FALSE")
_INT = re.compile("[-+]?(?:0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_STR = "tag:yaml.org,2002:str"
_V11 = yaml.resolver.Resolver()
_V11_BOOL = yaml.constructor.SafeConstructor.bool_values
# what PyYAML would break a line at, or drop, outside of double quotes
_ESCAPED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff]")
_UNUSED = {  # of yaml: what no recipe needs
    yaml.AliasToken: "alias (`*name`)",
    yaml.TagToken: "tag (`!name`)",
}


class YamlError(ValueError):
    """A text that is not yaml, or uses constructs not read here; caught within this package."""


@dataclass(frozen=True, eq=False)
class Plain:
    """A scalar without quotes that may be more than a text.

    Attributes:
        text: its characters.
        value: its value where the key has no type.
        clear: whether all versions of yaml read this value, or only YAML 1.1 or 1.2.
    """

    text: str
    value: int | float | bool | str
    clear: bool


def parse(text: str) -> tuple[yaml.Node | None, Any]:
    """The node tree of a yaml text, with line numbers, and its values; keys are always texts.

    Raises:
        YamlError: for what is not yaml, or has an alias or a tag.
    """
    if (end := re.search("[\x85\u2028\u2029]", text)) is not None:
        line, code = text.count("\n", 0, end.start()) + 1, f"\\u{ord(end[0]):04x}"
        raise YamlError(
            f"line {line} has a character that yaml takes for a line end; write {code} in its "
            "place, in double quotes"
        )
    try:
        for token in yaml.scan(text, Loader=yaml.BaseLoader):
            if (construct := _UNUSED.get(type(token))) is not None:
                line = token.start_mark.line + 1
                raise YamlError(
                    f"line {line} has a yaml {construct}; write the value out, in quotes"
                )
        root = yaml.compose(text, Loader=yaml.BaseLoader)
        return root, None if root is None else _value(root)
    except RecursionError:
        raise YamlError("it is nested too deeply") from None
    except yaml.YAMLError as error:
        raise YamlError(f"not valid yaml: {' '.join(str(error).split())}") from error


def parse_typed(text: str) -> Any:
    """The value of a command-line override: text that begins with [, {, " or ' is yaml.

    Anything else is one scalar of exactly these characters, also with `#`, `: `, a leading `-`, `@`
    or line breaks, which yaml would interpret.

    Raises:
        YamlError: for yaml that says more than its value, such as a comment, or no value at all.
    """
    plain = text.strip(_WHITE)
    if not plain:
        raise YamlError("there is no value; write '' in quotes for an empty text, null for none")
    if plain[0] not in "[{\"'":
        value = read_plain(plain)
        if isinstance(value, Plain):
            return Plain(text, value.value, value.clear)
        return None if value is None else text
    root, value = parse(text)
    if duplicate_keys := [key for key, _ in duplicates(root)]:
        raise YamlError(f"`{dotted(duplicate_keys[0])}` is given twice")
    _require_all_used(text)
    return value


def read_plain(text: str) -> Plain | str | None:
    """The value of a scalar without quotes; `Plain` where it may be more than a text."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return Plain(text, text.lower() == "true", clear=True)
    number = _number(text)
    if number is not None:
        return Plain(text, number, clear=True)
    in_v11: str = _V11.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
    if in_v11 == _STR and not _FLOAT.fullmatch(text) and not _INT.fullmatch(text):
        return text
    return Plain(text, _V11_BOOL.get(text.lower(), text), clear=False)


def _number(text: str) -> int | float | None:
    """The number that both YAML 1.2 and Python read; None where there is none, or it is too big."""
    if _INT.fullmatch(text):
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text, base) if len(text) < 1000 else None
    if not _FLOAT.fullmatch(text):
        return None
    if text.lower().endswith(("inf", "nan")):
        return float(text.replace(".", ""))
    return None if math.isinf(float(text)) else float(text)


def _value(node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return {_key(key): _value(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_value(item) for item in node.value]
    assert isinstance(node, yaml.ScalarNode)  # there is no fourth kind
    return node.value if node.style else read_plain(node.value)


def _key(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise YamlError(f"line {node.start_mark.line + 1} has a key that is no text")
    return str(node.value)


def _require_all_used(text: str) -> None:
    """Raises YamlError for characters that yaml would drop: comments and folded line breaks."""
    end = 0
    for token in sorted(
        yaml.scan(text, Loader=yaml.BaseLoader), key=lambda token: token.start_mark.index
    ):
        start, stop = token.start_mark, token.end_mark
        if text[end : start.index].strip():
            raise YamlError("yaml reads a part of it as a comment; put the text in quotes")
        if isinstance(token, yaml.AnchorToken):
            raise YamlError("yaml reads a part of it as an anchor; put the text in quotes")
        if isinstance(token, yaml.ScalarToken) and start.line != stop.line:
            raise YamlError(r"a line break in quotes would be lost; write \n in double quotes")
        end = max(end, stop.index)


def pairs(node: yaml.Node | None, where: Where = ()) -> Iterator[tuple[Where, yaml.Node]]:
    """Every key of a yaml tree with its path, duplicates included."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = (*where, str(key.value))
            yield path, key
            yield from pairs(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield (*where, i), value
            yield from pairs(value, (*where, i))


def duplicates(root: yaml.Node | None) -> Iterator[tuple[Where, int]]:
    """Keys that are given twice, each with its second line."""
    seen: set[Where] = set()
    for where, node in pairs(root):
        if where in seen:
            yield where, node.start_mark.line + 1
        seen.add(where)


def dotted(where: Where) -> str:
    """A path of keys in the dotted form of --set."""
    return ".".join(map(str, where))


def resolve(kind: type[BaseModel], values: Any) -> tuple[Any, list[str]]:
    """The values with every plain scalar converted to the type of its key.

    Args:
        kind: the model that they are for.
        values: from `parse`, with `Plain` in them.

    Returns:
        the values, and an error for each scalar without a type on which versions of yaml differ.
    """
    expected_types: dict[int, set[str]] = {}
    try:
        kind.model_validate(values)
    except ValidationError as error:
        # no type accepts a `Plain`, so the errors of each list all types allowed there
        for problem in error.errors():
            expected_types.setdefault(id(problem["input"]), set()).add(problem["type"])
    undecided = []

    def decided(plain: Plain, where: Where) -> Any:
        types = expected_types.get(id(plain), set())
        if not plain.clear and (not types or types >= {"string_type", "bool_type"}):
            undecided.append(
                f"`{dotted(where)}` is {plain.text}, which is not the same in all of yaml: write a "
                "text in quotes, a switch as true or false, a number without leading zeros"
            )
        return _as_type(plain, types)

    return _replaced(values, decided), undecided


def _as_type(plain: Plain, types: set[str]) -> Any:
    """A plain scalar converted to one of the expected types, else to its default value."""
    number = plain.clear and not isinstance(plain.value, bool)
    matching = {"int_type", "float_type"} if number else {"bool_type"}
    if number and "int_type" in types and "float_type" not in types and "e" in plain.text.lower():
        whole = isinstance(plain.value, float) and plain.value.is_integer()
        return int(plain.value) if whole else plain.value
    if isinstance(plain.value, str) or (
        types & {"string_type", "path_type"} and not matching & types
    ):
        return plain.text
    return plain.value if plain.clear or matching & types else plain.text


def _replaced(value: Any, change: Callable[[Plain, Where], Any], where: Where = ()) -> Any:
    if isinstance(value, Mapping):
        return {key: _replaced(v, change, (*where, key)) for key, v in value.items()}
    if isinstance(value, list):
        return [_replaced(v, change, (*where, i)) for i, v in enumerate(value)]
    return change(value, where) if isinstance(value, Plain) else value


def no_texts(value: Any, where: Where = ()) -> Iterator[Where]:
    """Paths of texts with a NUL or half a surrogate pair, as bytes that are not UTF-8 become."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from no_texts(item, (*where, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from no_texts(item, (*where, i))
    elif isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
        yield where


def to_yaml(values: Any, *, flow: bool = False) -> str:
    """Plain values as yaml that `parse` reads as the same values."""
    options: dict[str, Any] = {"default_flow_style": True, "width": 1 << 20} if flow else {}
    if not flow:
        options["allow_unicode"] = True
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False, **options))


class _Dumper(yaml.SafeDumper):
    """Quotes texts that YAML 1.2 would read as another type; 1.1's are quoted by PyYAML."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(f"(?:{_INT.pattern}|{_FLOAT.pattern})$"),
    list("-+.0123456789"),
)
_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        _STR, text, style='"' if _ESCAPED.search(text) else None
    ),
)
