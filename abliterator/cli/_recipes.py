"""`abliterator recipes`: the recipes that come with the package."""

from __future__ import annotations

import shutil
import textwrap
from typing import TYPE_CHECKING

import click

from abliterator.cli._options import JSON
from abliterator.cli._terminal import echo, show
from abliterator.errors import RecipeError
from abliterator.files import read_text

if TYPE_CHECKING:
    from abliterator.recipe import BundledRecipe


@click.group(invoke_without_command=True, short_help="List the recipes of the package.")
@JSON
@click.pass_context
def recipes(context: click.Context, as_json: bool) -> None:
    """List the recipes that come with the package; `build` takes their names."""
    from abliterator.recipe import bundled_recipes

    if context.invoked_subcommand is None:
        listed = [recipe._asdict() | {"path": str(recipe.path)} for recipe in bundled_recipes()]
        show(listed, lambda _: _listing(bundled_recipes()), as_json=as_json)


@recipes.command(name="show")
@click.argument("name")
def show_recipe(name: str) -> None:
    """Print the recipe NAME with its comment, as a file to start from."""
    from abliterator.recipe import bundled_recipes

    paths = {recipe.name: recipe.path for recipe in bundled_recipes()}
    if name not in paths:
        raise RecipeError(f"The package has no recipe {name!r}. It has {', '.join(paths)}.")
    echo(read_text(paths[name]), nl=False)


def _listing(bundled: list[BundledRecipe]) -> str:
    """Name and model on a line, and what the recipe needs, wrapped in its own column."""
    names = max(len(recipe.name) for recipe in bundled)
    models = max(len(recipe.model) for recipe in bundled)
    total = shutil.get_terminal_size((100, 24)).columns
    lines = []
    for recipe in bundled:
        start = f"{recipe.name:{names}}  {recipe.model:{models}}"
        needs = recipe.needs
        if len(start) + 2 + max(len(r.needs) for r in bundled) <= total:
            lines.append(f"{start}  {needs}")
        else:
            indent = " " * (names + 2)
            wrapped = textwrap.wrap(needs, max(20, total - len(indent)))
            lines += [start.rstrip(), *(indent + line for line in wrapped)]
    return "\n".join([*lines, "", "Next: abliterator recipes show NAME; abliterator build NAME"])
