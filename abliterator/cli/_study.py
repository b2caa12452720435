"""`abliterator study`: the choices behind a recipe, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from abliterator.cli._options import JSON, read_recipe, recipe_arguments
from abliterator.cli._terminal import Bars, show

NAMES = ("extraction", "pairs", "alpha", "confirmation", "controls")


class Numbers(click.ParamType[tuple[Any, ...]]):
    """Numbers between commas."""

    name = "numbers"

    def __init__(self, kind: type[int] | type[float]) -> None:
        self.kind = kind

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[Any, ...]:
        """The numbers."""
        try:
            return tuple(map(self.kind, value.split(",")))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 1,2", param, ctx)


@click.command()
@click.argument("name", type=click.Choice(NAMES))
@recipe_arguments()
@click.option("--limit", type=click.IntRange(min=1), help="Prompts of each set.  [the recipe's]")
@click.option("--tokens", type=click.IntRange(min=1), help="Tokens of an answer.  [the recipe's]")
@click.option("--layers", type=Numbers(int), help="For pairs, as 8,16,24.  [default: all]")
@click.option("--alphas", type=Numbers(float), help="For alpha, as 0,0.5,1.")
@JSON
def study(
    name: str,
    recipe: Path,
    limit: int | None,
    tokens: int | None,
    layers: tuple[int, ...] | None,
    alphas: tuple[float, ...] | None,
    as_json: bool,
    **arguments: Any,
) -> None:
    r"""Measure the choices behind RECIPE; tables go to stdout and OUT/work/studies.

    \b
    extraction    directions from left-padded batches against one prompt at a time
    pairs         each layer's direction by a paired (contrast) and a generic (neutral) contrast
    alpha         h <- h - alpha Q Q^T h on every block's output, for several alphas
    confirmation  the best layers alone, then 3, 5 and all of them stacked
    controls      the recipe's edit along random directions, and those of shuffled labels
    """
    from abliterator import pipeline
    from abliterator.study import to_markdown

    parsed, out, options = read_recipe(recipe, **arguments)
    chosen_alphas = {"alphas": alphas} if alphas else {}
    settings = pipeline.StudySettings(limit=limit, tokens=tokens, layers=layers, **chosen_alphas)
    result = pipeline.run_study(name, parsed, out, settings, options=options, progress=Bars())
    show(result, to_markdown, as_json=as_json)
