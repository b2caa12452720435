"""`abliterator plan`: prints the plan of a recipe, or of an edit of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from abliterator.cli._options import JSON, SET
from abliterator.cli._terminal import render, show

if TYPE_CHECKING:
    from abliterator.pipeline import Plan


@click.command(short_help="Show what a recipe would do.")
@click.argument("recipe_or_model")
@click.option("--out", type=click.Path(path_type=Path), default="out", help="Where it would go.")
@SET
@JSON
def plan(recipe_or_model: str, out: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show what a recipe, or the default edit of a model, would do; read headers only."""
    from abliterator import pipeline
    from abliterator.recipe import load_edit, load_recipe

    path = Path(recipe_or_model)
    if path.suffix in {".yaml", ".yml"}:
        planned = pipeline.plan_recipe(load_recipe(path, overrides=overrides), out)
    else:
        planned = pipeline.plan_model(recipe_or_model, out, edit=load_edit(overrides))
    show(planned.summary(), lambda _: plan_text(planned), as_json=as_json)


def plan_text(plan: Plan) -> str:
    """A plan in a few lines."""
    return render("plan", s=plan.summary(), notes=plan.notes)
