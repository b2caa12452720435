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
    computing_arguments,
    recipe_path,
    run_recipe,
)
from abliterator.cli._terminal import byte_size, fitted, render, show

if TYPE_CHECKING:
    from abliterator.pipeline import Plan


@click.command(short_help="Show what a recipe would do.")
@click.argument("recipe_or_model")
@click.option("--out", type=click.Path(path_type=Path), default="out", help="Where it would go.")
@SET
@computing_arguments
@VLLM_PYTHON
@click.option(
    "--calibrate",
    is_flag=True,
    help="Measure this machine first, in a few seconds; later plans estimate times by that.",
)
@JSON
def plan(
    recipe_or_model: str,
    out: Path,
    overrides: tuple[str, ...],
    device: str,
    dtype: str,
    max_memory: int | None,
    vllm_python: str | None,
    calibrate: bool,
    as_json: bool,
) -> None:
    """Show what a recipe, or the default edit of a model, would do; read headers only.

    Where a recipe lacks something (prompts, a key, disk space, a device), all of it is listed, and
    the exit code is 1.
    """
    from abliterator import pipeline
    from abliterator.recipe import load_edit, load_recipe

    path = recipe_path(recipe_or_model) or Path(recipe_or_model)
    options = pipeline.Options(device, dtype, max_memory, vllm_python=vllm_python)
    if (path / "work").is_dir():
        recipe, out = run_recipe(path, overrides), path
        planned = pipeline.plan_recipe(recipe, out, options=options, measure=calibrate)
    elif path.suffix in {".yaml", ".yml"}:
        recipe = load_recipe(path, overrides=overrides)
        planned = pipeline.plan_recipe(recipe, out, options=options, measure=calibrate)
    else:
        edit = load_edit(overrides)
        planned = pipeline.plan_model(recipe_or_model, out, edit=edit, options=options)
    show(planned.summary(), lambda _: plan_text(planned), as_json=as_json)
    if planned.missing:
        sys.exit(1)


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
