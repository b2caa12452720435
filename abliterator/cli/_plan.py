"""`abliterator plan`: prints the plan of a recipe, or of an edit of a model."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from abliterator.cli._options import (
    JSON,
    SET,
    VLLM_PYTHON,
    RecipeOrModel,
    computing_arguments,
    read_recipe,
    worker_arguments,
)
from abliterator.cli._terminal import byte_size, fitted, render, show

if TYPE_CHECKING:
    from abliterator.pipeline import Plan


@click.command(short_help="Show what a recipe would do.")
@click.argument("recipe_or_model", type=RecipeOrModel())
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Where it would go.  [default: out/RECIPE, or out]",
)
@SET
@computing_arguments
@worker_arguments
@VLLM_PYTHON
@click.option(
    "--calibrate",
    is_flag=True,
    help="Measure this machine first, in a few seconds; later plans estimate times by that.",
)
@JSON
def plan(
    recipe_or_model: Path | str,
    calibrate: bool,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Show what a recipe, or the default edit of a model, would do; read headers only.

    A recipe is a file, a name of `abliterator recipes`, or the folder of an earlier run. Where it
    lacks something (prompts, a key, disk space, a device), all of it is listed, and the exit code
    is 1.
    """
    from abliterator import pipeline

    if isinstance(recipe_or_model, Path):
        recipe, out, options = read_recipe(recipe_or_model, force=False, **arguments)
        planned = pipeline.plan_recipe(recipe, out, options=options, measure=calibrate)
    else:
        planned = _plan_of_model(recipe_or_model, **arguments)
    show(planned.summary(), lambda _: plan_text(planned), as_json=as_json)
    if planned.missing:
        sys.exit(1)


def _plan_of_model(
    model: str, *, out: Path | None, overrides: tuple[str, ...], **arguments: Any
) -> Plan:
    from abliterator import pipeline
    from abliterator.recipe import load_edit

    options, edit = pipeline.Options(**arguments), load_edit(overrides)
    return pipeline.plan_model(model, out or Path("out"), edit=edit, options=options)


def plan_text(plan: Plan) -> str:
    """A plan in a few lines, of the terminal's width where stdout is one."""
    summary = plan.summary()
    return fitted(render("plan", s=summary, notes=plan.notes, placed=placed(summary["where"])))


def placed(where: Mapping[str, Any]) -> str:
    """Where weights will lie, in words; accelerators are counted where they are several."""
    places = dict(where["places"])
    on = {name: size for name, size in places.items() if name not in ("cpu", "disk")}
    parts = []
    if len(on) > 1:
        size = byte_size(sum(on.values()))
        parts.append(f"{size} on {len(on)} of {where['devices']} accelerators ({', '.join(on)})")
    elif on:
        (name,) = on
        parts.append(f"{byte_size(on[name])} on {name} ({byte_size(where['free'][name])} free)")
    if "cpu" in places:
        free = byte_size(where["free"]["cpu"])
        parts.append(f"{byte_size(places['cpu'])} in host memory ({free} free)")
    if "disk" in places:
        parts.append(f"{byte_size(places['disk'])} on disk")
    return ", ".join(parts)
