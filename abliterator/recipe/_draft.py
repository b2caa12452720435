"""Writes a draft recipe: chosen values, and every other key as a comment with its default."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic_core import to_jsonable_python

from abliterator.recipe._recipe import Recipe
from abliterator.recipe._section import Section
from abliterator.recipe._yaml import to_yaml

WIDTH = 100


def draft(chosen: Mapping[str, Any], preamble: Sequence[str] = ()) -> str:
    """The text of a recipe, with the docstring of every key as a comment.

    A `#` with no space behind it hides a key at its default: without any of them, the recipe means
    the same.

    Args:
        chosen: plain values by key, sections as mappings; at least `model`, `layers` and `k`.
        preamble: lines of a comment at the top.
    """
    lines = [*(f"# {line}".rstrip() for line in preamble), ""]
    for name, field in Recipe.model_fields.items():
        default = field.default
        if isinstance(default, Section):
            lines += ["", *_comment(inspect.getdoc(type(default)))]
            lines += _section(name, default, chosen.get(name, {}))
        else:
            lines += [*_comment(field.description), _key(name, default, chosen)]
    return "\n".join(lines) + "\n"


def short_draft(chosen: Mapping[str, Any], preamble: Sequence[str] = ()) -> str:
    """The text of a recipe of `chosen` alone.

    Args:
        chosen: plain values by key, sections as mappings; at least `model`, `layers` and `k`.
        preamble: lines of a comment at the top.
    """
    lines = [f"# {line}".rstrip() for line in preamble]
    for name, value in chosen.items():
        if not isinstance(value, Mapping):
            lines.append(f"{name}: {_flow(value)}")
        else:
            lines += [f"{name}:", *(f"  {key}: {_flow(inner)}" for key, inner in value.items())]
    return "\n".join(lines) + "\n"


def _section(name: str, defaults: Section, chosen: Mapping[str, Any]) -> list[str]:
    """The lines of a section; its name is a comment too where no value in it was chosen."""
    kind = type(defaults)
    own = inspect.get_annotations(kind)  # its own keys stand before inherited ones
    lines = [f"{name}:" if chosen else f"#{name}:"]
    for key in sorted(kind.model_fields, key=lambda key: key not in own):
        lines += _comment(kind.model_fields[key].description, "  ")
        lines.append("  " + _key(key, getattr(defaults, key), chosen))
    return lines


def _key(name: str, default: Any, chosen: Mapping[str, Any]) -> str:
    if name in chosen:
        return f"{name}: {_flow(chosen[name])}"
    return f"#{name}: {_flow(default)}"


def _flow(value: Any) -> str:
    """A value on one line of yaml."""
    if isinstance(value, Section):
        value = value.model_dump(mode="json", exclude_defaults=True)
    plain = to_jsonable_python(value)
    return to_yaml([plain], flow=True).strip()[1:-1]


def _comment(text: str | None, indent: str = "") -> Iterator[str]:
    for paragraph in (text or "").split("\n\n"):
        yield from textwrap.wrap(
            " ".join(paragraph.split()),
            WIDTH,
            initial_indent=f"{indent}# ",
            subsequent_indent=f"{indent}# ",
        )
