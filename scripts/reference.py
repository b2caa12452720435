"""Writes docs/commands.md and docs/recipe_keys.md from the commands and the recipe's types.

    python scripts/reference.py            # after a change of a command or of a key
    python scripts/reference.py --check    # exits with 1 where a page is not up to date

A command's text is its `--help`; a key's text is the docstring beside it. The pages are committed,
so that they can be read without the documentation's own build.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel

from abliterator.cli import main as command_line
from abliterator.files import write_text_atomic
from abliterator.recipe import Recipe, to_yaml

DOCS = Path(__file__).parents[1] / "docs"
NOTE = "<!-- written by scripts/reference.py -->"


def commands_page(group: click.Group) -> str:
    """Markdown: every command with its synopsis, its text and its options."""
    lines = ["# Commands", "", NOTE, ""]
    for name, command in group.commands.items():
        if not command.hidden:
            lines += _command(["abliterator", name], command)
    return "\n".join(lines).rstrip() + "\n"


def _command(path: Sequence[str], command: click.Command) -> Iterator[str]:
    context = click.Context(command, info_name=" ".join(path))
    usage = " ".join([*path, *command.collect_usage_pieces(context)])
    yield from (f"## `{' '.join(path)}`", "", "```text", usage, "```", "")
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        yield from (" ".join(paragraph.replace("\b", "").split()), "")
    options = [p for p in command.params if isinstance(p, click.Option) and not p.hidden]
    if options:
        yield from ("| option | meaning |", "|---|---|")
        for option in options:
            record = option.get_help_record(context)
            if record is not None:
                yield f"| `{_cell(record[0])}` | {_cell(record[1])} |"
        yield ""
    for name, sub in getattr(command, "commands", {}).items():
        yield from _command([*path, name], sub)


def keys_page(recipe: type[Recipe]) -> str:
    """Markdown: every key of a recipe with its default and its meaning, section by section."""
    lines = ["# Keys of a recipe", "", NOTE, "", "| key | default | meaning |", "|---|---|---|"]
    sections = []
    for name, field in recipe.model_fields.items():
        if isinstance(field.default, BaseModel):
            sections.append((name, field.default))
        else:
            lines.append(_key(name, "" if field.is_required() else field.default, field))
    for name, section in sections:
        lines += ["", f"## `{name}`", "", _prose(inspect.getdoc(type(section))), ""]
        lines += ["| key | default | meaning |", "|---|---|---|"]
        for key, field in type(section).model_fields.items():
            lines.append(_key(key, getattr(section, key), field))
    return "\n".join(lines) + "\n"


def _key(name: str, default: Any, field: Any) -> str:
    plain = (
        default.model_dump(mode="json", exclude_defaults=True)
        if isinstance(default, BaseModel)
        else default
    )
    text = "" if default == "" else f"`{_cell(to_yaml([plain], flow=True).strip()[1:-1])}`"
    return f"| `{name}` | {text} | {_cell(_prose(field.description))} |"


def _prose(text: str | None) -> str:
    return " ".join((text or "").split())


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


PAGES = {
    "commands.md": lambda: commands_page(command_line),
    "recipe_keys.md": lambda: keys_page(Recipe),
}


def main() -> None:
    """Writes the pages, or with --check compares them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for name, page in PAGES.items():
        path, text = DOCS / name, page()
        if not path.is_file() or path.read_text("utf-8") != text:
            stale.append(name)
            if not check:
                write_text_atomic(path, text)
    if check and stale:
        sys.exit(f"not up to date: {', '.join(stale)}; run `python scripts/reference.py`")


if __name__ == "__main__":
    main()
