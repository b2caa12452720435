"""`abliterator demo`: the demo is built, and what its model answered is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from abliterator.cli._build import build
from abliterator.cli._options import computing_arguments
from abliterator.cli._terminal import echo, render

RECIPE = "demo"
SHOWN = {"target": 3, "neutral": 1}  # answers of each set


@click.command(short_help="Build the demo, and show its answers.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("out") / RECIPE,
    show_default=True,
    help="Output folder.",
)
@computing_arguments
@click.pass_context
def demo(context: click.Context, /, out: Path, **computing: Any) -> None:
    """Build the demo, and show what its model answered before and after.

    A small model that comes with the package declines one topic of a toy world, until the build
    removes that. It takes about a minute on any CPU, and no network. The same as `abliterator build
    demo`, with more of the answers.
    """
    from abliterator.pipeline import answer_pairs
    from abliterator.recipe import bundled_recipes

    (recipe,) = [bundled for bundled in bundled_recipes() if bundled.name == RECIPE]
    context.invoke(build, recipe=recipe.path, out=out, overrides=(), **computing)
    pairs = answer_pairs(out)
    shown = [pair for name, n in SHOWN.items() for pair in [p for p in pairs if p.set == name][:n]]
    echo("\n" + render("answers", pairs=shown))
