"""Arguments that several commands share, and the values made from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from abliterator.pipeline import Options
    from abliterator.recipe import JudgeSettings, Recipe

Command = Callable[..., Any]

SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change one value of the recipe: --set k=3 --set prompts.target.path=FILE.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")

COMPUTING = (
    click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps."),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        show_default=True,
        help="Dtype of computation; stored weights keep theirs.",
    ),
)

WHERE = (
    click.option(
        "--out", type=click.Path(path_type=Path), help="Output folder.  [default: out/RECIPE]"
    ),
    SET,
    *COMPUTING,
    click.option("--force", is_flag=True, help="Continue in a folder that another recipe made."),
)


JUDGE = (
    click.option(
        "--judge",
        "kind",
        type=click.Choice(["rules", "openai"]),
        help="What grades the answers.  [default: the recipe's judge, else rules]",
    ),
    click.option(
        "--recipe",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="Use the `judge` section of this recipe.",
    ),
    SET,
)


def computing_arguments(command: Command) -> Command:
    """Adds --device and --dtype to a command."""
    return _decorated(command, COMPUTING)


def judge_arguments(command: Command) -> Command:
    """Adds --judge, --recipe and --set to a command."""
    return _decorated(command, JUDGE)


def read_judge(
    *, kind: str | None, recipe: Path | None, overrides: tuple[str, ...]
) -> JudgeSettings:
    """The judge settings that `judge_arguments` give."""
    from abliterator.recipe import load_judge, load_recipe

    if kind is not None:
        overrides = (f"judge.kind={kind}", *overrides)
    if recipe is not None:
        return load_recipe(recipe, overrides=overrides).judge
    return load_judge(overrides)


def recipe_arguments(*, required: bool = True) -> Callable[[Command], Command]:
    """Adds RECIPE, --out, --set, --device, --dtype and --force to a command."""
    argument = click.argument(
        "recipe", required=required, type=click.Path(exists=True, path_type=Path)
    )

    def decorate(command: Command) -> Command:
        return _decorated(command, (argument, *WHERE))

    return decorate


def _decorated(command: Command, decorators: Sequence[Callable[[Command], Command]]) -> Command:
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def read_recipe(
    recipe: Path,
    *,
    out: Path | None,
    overrides: tuple[str, ...],
    device: str,
    dtype: str,
    force: bool,
) -> tuple[Recipe, Path, Options]:
    """The recipe (from a file, or the folder of an earlier run), the output folder, options."""
    from abliterator.pipeline import Options, recipe_of
    from abliterator.recipe import load_recipe

    options = Options(device=device, dtype=dtype, force=force)
    if recipe.is_dir():
        if overrides or out:
            raise click.UsageError("The folder of an earlier run takes neither --set nor --out.")
        return recipe_of(recipe), recipe, options
    return load_recipe(recipe, overrides=overrides), out or Path("out") / recipe.stem, options
