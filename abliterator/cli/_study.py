"""`abliterator study`: the choices behind a recipe, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from abliterator.cli._options import JSON, read_recipe, recipe_arguments
from abliterator.cli._terminal import Bars, show

NAMES = ("extraction", "pairs", "alpha", "confirmation", "controls", "estimators")


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


HELP = """
Measure a choice behind RECIPE. NAME is one of the studies below; its tables go
to stdout and OUT/work/studies.

\b
extraction    Do the directions depend on padding? Left-padded batches
              against one prompt at a time.
pairs         Does the contrast matter? Each layer's direction against
              paired prompts (contrast) and against neutral ones.
alpha         How strong must a removal be? h - alpha Q Q^T h on the
              output of every block, for several alphas.
confirmation  How many directions? The best layers alone, then 3, 5 and
              all of them stacked.
controls      Is it these directions? The same edit along random ones, at
              its strengths and at its KL, and along those of shuffled
              labels; p-values among --draws of either.
estimators    How are directions best estimated, and stacked? Every way on
              the same prompts, layers and strengths (--scales).
"""


@click.command(help=HELP, short_help="Measure a choice behind a recipe.")
@click.argument("name", metavar="NAME", type=click.Choice(NAMES))
@recipe_arguments()
@click.option("--limit", type=click.IntRange(min=1), help="Prompts of each set.  [the recipe's]")
@click.option("--tokens", type=click.IntRange(min=1), help="Tokens of an answer.  [the recipe's]")
@click.option("--layers", type=Numbers(int), help="For pairs and estimators, as 8,16,24.")
@click.option("--alphas", type=Numbers(float), help="For alpha, as 0,0.5,1.")
@click.option("--scales", type=Numbers(float), help="For estimators, of the strengths: 0.5,1.")
@click.option(
    "--draws",
    type=click.IntRange(min=0),
    default=99,
    show_default=True,
    help="For controls: of each null distribution; 0 leaves them out.",
)
@JSON
def study(
    name: str,
    recipe: Path,
    limit: int | None,
    tokens: int | None,
    layers: tuple[int, ...] | None,
    alphas: tuple[float, ...] | None,
    scales: tuple[float, ...] | None,
    draws: int,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Measures a choice behind a recipe."""
    from abliterator import pipeline
    from abliterator.study import to_markdown

    parsed, out, options = read_recipe(recipe, **arguments)
    given = {"alphas": alphas, "scales": scales}
    chosen: dict[str, Any] = {name: numbers for name, numbers in given.items() if numbers}
    settings = pipeline.StudySettings(
        limit=limit, tokens=tokens, layers=layers, draws=draws, **chosen
    )
    result = pipeline.run_study(name, parsed, out, settings, options=options, progress=Bars())
    show(result, to_markdown, as_json=as_json)
