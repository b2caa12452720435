"""The commands that run a recipe, whole or stage by stage, and the plan that comes before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from abliterator.cli._options import JSON, SET, read_recipe, recipe_arguments
from abliterator.cli._print import echo
from abliterator.cli._terminal import Bars, json_of, planned, reproduced, told
from abliterator.files import read_text


@click.command()
@recipe_arguments(required=False)
@click.option(
    "--from", "published", help="In place of RECIPE: a published checkpoint, its folder or Hub id."
)
@JSON
def build(recipe: Path | None, published: str | None, as_json: bool, **where: Any) -> None:
    """Run the whole pipeline: RECIPE becomes OUT/checkpoint, measured, with its card.

    RECIPE is a recipe file, or the folder of an earlier run. With --from, the recipe of a published
    checkpoint is built again, and the edited tensors are compared with the published ones.
    """
    from abliterator import pipeline
    from abliterator.source import RECIPE, published_folder

    if published is None and recipe is not None:
        folder, path = None, recipe
    elif published is not None and recipe is None:
        folder = published_folder(published)
        path, where["out"] = folder / RECIPE, where["out"] or Path("out") / "rebuilt"
    else:
        raise click.UsageError("Give either a RECIPE or --from a published checkpoint.")
    read, out, options = read_recipe(path, **where)
    record = pipeline.build(read, out, options=options, progress=Bars())
    echo(json_of(record) if as_json else told(record, out))
    if folder is not None:
        echo(reproduced(pipeline.compare_rebuilt(folder, out / "checkpoint")), err=as_json)


def _stage_command(stage: str, help_text: str) -> click.Command:
    """The command of one stage: it runs what the stage needs, then the stage."""

    @click.command(name=stage, help=help_text)
    @recipe_arguments()
    def command(recipe: Path, **where: Any) -> None:
        from abliterator import pipeline

        read, out, options = read_recipe(recipe, **where)
        pipeline.run_stages(read, out, until=stage, options=options, progress=Bars())
        echo(out)

    return command


STAGE_COMMANDS = (
    _stage_command("directions", "Capture activations and find the subspace."),
    _stage_command("rollouts", "Let base and edited answer the evaluation prompts."),
    _stage_command("judge", "Judge the answers of base and edited."),
    _stage_command("benchmarks", "Run lm-eval on base and edited."),
    _stage_command("card", "Write record.json and the model card."),
)


@click.command()
@recipe_arguments(required=False)
@click.option("--model", help="Without a recipe: Hub id or local folder.")
@click.option(
    "--subspace",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Without a recipe: safetensors file with a tensor `subspace` [d_model, k], or "
    "[n_layers, d_model, k] with one a block.",
)
@JSON
def bake(
    recipe: Path | None, model: str | None, subspace: Path | None, as_json: bool, **where: Any
) -> None:
    """Write the edited checkpoint: of RECIPE, or of --model and --subspace into --out."""
    from abliterator import pipeline

    if recipe is None:
        edits = _bake_subspace(model, subspace, where)
        place = where["out"]
    else:
        if model or subspace:
            raise click.UsageError("--model and --subspace are given instead of a RECIPE.")
        read, out, options = read_recipe(recipe, **where)
        pipeline.run_stages(read, out, until="bake", options=options, progress=Bars())
        place = out / "checkpoint"
        edits = json.loads(read_text(place / "abliterator" / "edits.json"))
    echo(json.dumps(edits, indent=1) if as_json else f"{place}: {len(edits)} tensors edited")


def _bake_subspace(model: str | None, subspace: Path | None, where: dict[str, Any]) -> list[Any]:
    from abliterator import pipeline
    from abliterator.recipe import load_edit

    if not (model and subspace and where["out"]):
        raise click.UsageError("Give a RECIPE, or --model, --subspace and --out together.")
    edits = pipeline.bake_subspace(
        model, subspace, where["out"], edit=load_edit(where["overrides"])
    )
    return [edit.model_dump(mode="json") for edit in edits]


@click.command()
@click.argument("recipe_or_model")
@click.option("--out", type=click.Path(path_type=Path), default="out", help="Where it would go.")
@SET
@JSON
def plan(recipe_or_model: str, out: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Tell what a recipe, or the default edit of a model, would do; read headers only."""
    from abliterator import pipeline
    from abliterator.recipe import load_edit, load_recipe

    path = Path(recipe_or_model)
    if path.suffix in {".yaml", ".yml"}:
        made = pipeline.plan_recipe(load_recipe(path, overrides=overrides), out)
    else:
        made = pipeline.plan_model(recipe_or_model, out, edit=load_edit(overrides))
    echo(json.dumps(made.summary(), indent=1) if as_json else planned(made))
