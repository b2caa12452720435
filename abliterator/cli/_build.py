"""`abliterator build`: a recipe becomes a measured checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from abliterator.cli._options import JSON, bars_of, read_recipe, recipe_arguments
from abliterator.cli._outcome import details_text, outcome_text
from abliterator.cli._terminal import echo, show

if TYPE_CHECKING:
    from abliterator.pipeline import Reproduction


@click.command(short_help="Run the whole pipeline of a recipe.")
@recipe_arguments(required=False)
@click.option(
    "--from", "published", help="In place of RECIPE: a published checkpoint, its folder or Hub id."
)
@click.option("--details", is_flag=True, help="Print every figure with its interval.")
@JSON
def build(
    recipe: Path | None, published: str | None, details: bool, as_json: bool, **arguments: Any
) -> None:
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
        path, arguments["out"] = folder / RECIPE, arguments["out"] or Path("out") / "rebuilt"
    else:
        raise click.UsageError("Give either a RECIPE or --from a published checkpoint.")
    parsed, out, options = read_recipe(path, **arguments)
    record = pipeline.build(parsed, out, options=options, progress=bars_of(parsed))
    as_text = details_text if details else outcome_text
    show(record, lambda record: as_text(record, out), as_json=as_json)
    if folder is not None:
        echo(_reproduction_text(pipeline.compare_rebuilt(folder, out / "checkpoint")), err=as_json)


def _reproduction_text(rebuilt: Reproduction) -> str:
    """How a rebuilt checkpoint compares with the published one."""
    total = rebuilt.same + len(rebuilt.different)
    lines = [f"{rebuilt.same} of {total} edited tensors are the published ones to the last bit"]
    if rebuilt.different:
        lines.append(f"different   {', '.join(rebuilt.different[:3])}...")
        lines += [f"published, rebuilt   {reason}" for reason in rebuilt.reasons]
        lines += [] if rebuilt.reasons else ["nothing recorded differs between the two builds"]
    return "\n".join(lines)
