"""`abliterator plan`: prints the plan of a recipe, or of an edit of a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from abliterator.cli._options import JSON, SET
from abliterator.cli._terminal import byte_size, echo

if TYPE_CHECKING:
    from abliterator.pipeline import Plan


@click.command()
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
    if as_json:
        echo(json.dumps(planned.summary(), indent=1))
    else:
        echo(plan_text(planned))


def plan_text(plan: Plan) -> str:
    """A plan in a few lines."""
    summary = plan.summary()
    size = {name: byte_size(count) for name, count in summary["bytes"].items()}
    memory = {name: byte_size(summary[f"{name}_memory"]) for name in ("bake", "model")}
    edited = ", ".join(f"{n} {component}" for component, n in summary["edited_tensors"].items())
    lines = [
        f"model        {summary['model']} ({summary['model_type']}, {summary['n_layers']} layers, "
        f"d_model {summary['d_model']})",
        *([f"layers       {summary['layers']}, k = {summary['k']}"] if summary["k"] else []),
        *([_selection_line(summary, plan.selection)] if plan.selection else []),
        *([_tuning_line(plan.tuning)] if plan.tuning else []),
        *(
            f"writers      {_writers_text(component, counts, summary)}"
            for component, counts in summary["writers"].items()
        ),
        f"edit         {edited or 'nothing'} tensors; {summary['untouched_tensors']} untouched",
        *_storage_lines(summary),
        f"bytes        read {size['read']}, edited {size['edited']}, written {size['written']}; "
        f"{size['free']} free",
        f"memory       {memory['bake']} to bake, beside Python's and torch's own; where the model "
        f"runs, {memory['model']} for its weights as they are stored",
        f"carried      {', '.join(summary['files']['carried'])}",
        f"left out     {', '.join(summary['files']['left_out']) or 'nothing'}",
        *(f"note         {note}" for note in plan.notes),
    ]
    return "\n".join(lines)


def _writers_text(component: str, counts: Mapping[str, int], summary: Mapping[str, Any]) -> str:
    where = f" in {counts['blocks']} of {summary['n_layers']} blocks" if counts["blocks"] else ""
    if component == "embedding" and summary["tied_embeddings"]:
        where = ", the output head too (tied)"
    experts = f", {summary['n_experts']} experts a block" if component == "expert" else ""
    edited = "all" if counts["edited"] == counts["tensors"] else counts["edited"] or "none"
    tensors = f"{counts['tensors']} of {counts['expected']} tensors"
    return f"{component}: {tensors}{where}{experts}; {edited} edited"


def _storage_lines(summary: Mapping[str, Any]) -> list[str]:
    lines = [f"stored as    {', '.join(f'{n} {name}' for name, n in summary['formats'].items())}"]
    if summary["through_gains"]:
        lines.append(
            f"norms        {summary['through_gains']} edits go through the gain of a norm that "
            "follows"
        )
    for entry in summary["quantised"]:
        lines.append(f"quantised    {entry['tensors']} tensors: {entry['format']}; {entry['way']}:")
        lines += [_storage_cost(way, entry[way]) for way in ("keep", "dequantize")]
    lines += [f"left alone   {n} tensors: {label}" for label, n in summary["left_alone"].items()]
    return lines if summary["formats"] else lines[1:]


def _storage_cost(way: str, cost: Mapping[str, Any]) -> str:
    size = byte_size(cost["bytes"])
    if cost["leak"] is None:
        return f"             {way}: {size} of weights; leak and noise not measured before"
    return (
        f"             {way}: {size} of weights, leak about {cost['leak']:.0e}, noise "
        f"{cost['noise']:.1%} of the weights (constants, k = {cost['k']})"
    )


def _selection_line(summary: Mapping[str, Any], cost: Mapping[str, int]) -> str:
    n = cost["candidates"]
    scope = f"sweep of {n} layers" if n else f"the first of {summary['layers']}"
    places = " at every position after the prompt" if cost["every_position"] else ""
    sizes = f", k found with {cost['stacks']} sizes" if cost["stacks"] else ""
    answers = f"about {cost['answers']} answers, {cost['tokens']} tokens in all"
    return (
        f"selection    {scope}{places}{sizes}; at most {cost['judged']} candidates judged on up to "
        f"{cost['prompts']} prompts: {answers}"
    )


def _tuning_line(cost: Mapping[str, int]) -> str:
    return (
        f"tuning       {cost['steps']} steps by gradients; {cost['trials']} trials judged, each on "
        f"{cost['answers_a_trial']} answers of {cost['tokens']} tokens at most"
    )
