"""`abliterator bake`: the edited checkpoint, of a recipe or of a given subspace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from abliterator.cli._options import FILE, JSON, bars_of, read_recipe, recipe_arguments
from abliterator.cli._terminal import show
from abliterator.files import read_text


@click.command(short_help="Write the edited checkpoint.")
@recipe_arguments(required=False)
@click.option("--model", help="Without a recipe: Hub id or local folder.")
@click.option(
    "--subspace",
    type=FILE,
    help="Without a recipe: safetensors file with a tensor `subspace` [d_model, k], or "
    "[n_layers, d_model, k] with one a block.",
)
@JSON
def bake(
    recipe: Path | None, model: str | None, subspace: Path | None, as_json: bool, **arguments: Any
) -> None:
    """Write the edited checkpoint: of RECIPE, or of --model and --subspace into --out."""
    from abliterator import pipeline

    if recipe is None:
        edits = _bake_subspace(model, subspace, arguments)
        checkpoint = arguments["out"]
    else:
        if model or subspace:
            raise click.UsageError("--model and --subspace are given instead of a RECIPE.")
        parsed, out, options = read_recipe(recipe, **arguments)
        pipeline.run_stages(
            parsed,
            out,
            until="bake",
            options=options,
            progress=bars_of(parsed, out, options, "bake"),
        )
        checkpoint = out / "checkpoint"
        edits = json.loads(read_text(checkpoint / "abliterator" / "edits.json"))
    show(edits, lambda edits: f"{checkpoint}: {len(edits)} tensors edited", as_json=as_json)


def _bake_subspace(
    model: str | None, subspace: Path | None, arguments: dict[str, Any]
) -> list[Any]:
    from abliterator import pipeline
    from abliterator.recipe import load_edit

    if not (model and subspace and arguments["out"]):
        raise click.UsageError("Give a RECIPE, or --model, --subspace and --out together.")
    _ = pipeline.Options(arguments["device"]).compute_device  # an absent one is an error here too
    edits = pipeline.bake_subspace(
        model, subspace, arguments["out"], edit=load_edit(arguments["overrides"])
    )
    return [edit.model_dump(mode="json") for edit in edits]
