"""`abliterator build`: a recipe becomes a measured checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from abliterator.cli._options import JSON, bars_of, read_recipe, recipe_arguments
from abliterator.cli._outcome import details_text, outcome_text
from abliterator.cli._terminal import Bars, echo, show
from abliterator.errors import AbliteratorError

if TYPE_CHECKING:
    from abliterator.pipeline import Reproduction
    from abliterator.record import RunRecord


@click.command(short_help="Run the whole pipeline of a recipe, or of several.")
@recipe_arguments(required=False, several=True)
@click.option(
    "--from", "published", help="In place of RECIPE: a published checkpoint, its folder or Hub id."
)
@click.option("--details", is_flag=True, help="Print every figure with its interval.")
@JSON
def build(
    recipes: tuple[Path, ...],
    published: str | None,
    details: bool,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Run the whole pipeline: RECIPE becomes OUT/checkpoint, measured, with its card.

    RECIPE is a recipe file, or the folder of an earlier run. With --from, the recipe of a published
    checkpoint is built again, and the edited tensors are compared with the published ones.

    Several RECIPEs are built one after the other, or with --workers or --ray side by side, one a
    worker; one that fails stops no other.
    """
    from abliterator import pipeline
    from abliterator.source import RECIPE, published_folder

    if published is None and len(recipes) > 1:
        _build_several(recipes, details=details, as_json=as_json, **arguments)
        return
    if published is None and recipes:
        folder, path = None, recipes[0]
    elif published is not None and not recipes:
        folder = published_folder(published)
        path, arguments["out"] = folder / RECIPE, arguments["out"] or Path("out") / "rebuilt"
    else:
        raise click.UsageError("Give either a RECIPE or --from a published checkpoint.")
    parsed, out, options = read_recipe(path, **arguments)
    record = pipeline.build(parsed, out, options=options, progress=bars_of(parsed, out, options))
    as_text = details_text if details else outcome_text
    show(record, lambda record: as_text(record, out), as_json=as_json)
    if folder is not None:
        echo(_reproduction_text(pipeline.compare_rebuilt(folder, out / "checkpoint")), err=as_json)


def _build_several(
    paths: Sequence[Path], *, details: bool, as_json: bool, **arguments: Any
) -> None:
    """Builds recipes, prints each result, and exits with 1 if one failed."""
    from abliterator import pipeline

    if arguments["out"] is not None:
        raise click.UsageError("--out names the folder of one RECIPE; several have out/RECIPE.")
    builds: dict[Path, pipeline.Build] = {}
    results: dict[Path, RunRecord | AbliteratorError] = {}
    options = pipeline.Options()
    for path in paths:
        try:
            recipe, out, options = read_recipe(path, **arguments)
            builds[path] = pipeline.Build(recipe, out)
        except AbliteratorError as error:
            results[path] = error
    if len({build.out.resolve() for build in builds.values()} | set(results)) < len(paths):
        raise click.UsageError("Two RECIPEs would be built in the same folder: rename one.")
    built = pipeline.build_several(list(builds.values()), options=options, progress=Bars())
    for path, result in zip(builds, built, strict=True):
        results[path] = result
        echo(f"{path}: {'failed' if isinstance(result, AbliteratorError) else 'built'}", err=True)
    records = {p: r for p in paths if not isinstance(r := results[p], AbliteratorError)}
    if as_json:
        show({str(path): record for path, record in records.items()}, str, as_json=True)
    for path, record in records.items():
        if not as_json:
            as_text = details_text if details else outcome_text
            echo(f"{path}\n{as_text(record, builds[path].out)}\n")
    for path, result in results.items():
        if isinstance(result, AbliteratorError):
            echo(f"{path}: {type(result).__name__}: {result}", err=True)
    if len(records) < len(results):
        click.get_current_context().exit(1)


def _reproduction_text(rebuilt: Reproduction) -> str:
    """How a rebuilt checkpoint compares with the published one."""
    total = rebuilt.same + len(rebuilt.different)
    lines = [f"{rebuilt.same} of {total} edited tensors are the published ones to the last bit"]
    if rebuilt.different:
        lines.append(f"different   {', '.join(rebuilt.different[:3])}...")
        lines += [f"published, rebuilt   {reason}" for reason in rebuilt.reasons]
        lines += [] if rebuilt.reasons else ["nothing recorded differs between the two builds"]
    return "\n".join(lines)
