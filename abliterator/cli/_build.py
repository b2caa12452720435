"""`abliterator build`: a recipe becomes a measured checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from abliterator.cli._options import JSON, read_recipe, recipe_arguments
from abliterator.cli._terminal import Bars, echo, render, show
from abliterator.errors import AbliteratorError
from abliterator.tables import cell, terminal_table

if TYPE_CHECKING:
    from abliterator.pipeline import Reproduction
    from abliterator.record import RunRecord

MEASURES = ("refusal", "compliance", "coherence", "truncated", "unscored")


@click.command()
@recipe_arguments(required=False, several=True)
@click.option(
    "--from", "published", help="In place of RECIPE: a published checkpoint, its folder or Hub id."
)
@JSON
def build(
    recipes: tuple[Path, ...], published: str | None, as_json: bool, **arguments: Any
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
        _build_several(recipes, as_json=as_json, **arguments)
        return
    if published is None and recipes:
        folder, path = None, recipes[0]
    elif published is not None and not recipes:
        folder = published_folder(published)
        path, arguments["out"] = folder / RECIPE, arguments["out"] or Path("out") / "rebuilt"
    else:
        raise click.UsageError("Give either a RECIPE or --from a published checkpoint.")
    parsed, out, options = read_recipe(path, **arguments)
    record = pipeline.build(parsed, out, options=options, progress=Bars())
    show(record, lambda record: _record_text(record, out), as_json=as_json)
    if folder is not None:
        echo(_reproduction_text(pipeline.compare_rebuilt(folder, out / "checkpoint")), err=as_json)


def _build_several(paths: Sequence[Path], *, as_json: bool, **arguments: Any) -> None:
    """Builds recipes, prints each record, and exits with 1 if one failed."""
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
            echo(f"{path}\n{_record_text(record, builds[path].out)}\n")
    for path, result in results.items():
        if isinstance(result, AbliteratorError):
            echo(f"{path}: {type(result).__name__}: {result}", err=True)
    if len(records) < len(results):
        click.get_current_context().exit(1)


def _record_text(record: RunRecord, out: Path) -> str:
    """What was measured, base and edited side by side."""
    from abliterator.judge import counted

    rows = [["", "base", "edited", "delta"]]
    for name, behaviour in record.behaviour.items():
        for measure in MEASURES if behaviour else ():
            sides = (getattr(behaviour, side) for side in ("base", "edited", "delta"))
            cells = [cell(getattr(s, measure)) for s in sides]
            detectable = behaviour.smallest_detectable.get(measure) if behaviour else None
            cells[2] += f", {detectable:.3f} detectable" if detectable is not None else ""
            rows.append([f"{name} {measure}", *cells])
    for task, result in record.benchmarks.items():
        estimates = (result.base, result.edited, result.delta)
        rows.append([f"{task} {result.metric}", *map(cell, estimates)])
    table = "\n".join(terminal_table(rows))
    checkpoint = out / "checkpoint"
    return render("record", r=record, checkpoint=checkpoint, table=table, counted=counted)


def _reproduction_text(rebuilt: Reproduction) -> str:
    """How a rebuilt checkpoint compares with the published one."""
    total = rebuilt.same + len(rebuilt.different)
    lines = [f"{rebuilt.same} of {total} edited tensors are the published ones to the last bit"]
    if rebuilt.different:
        lines.append(f"different   {', '.join(rebuilt.different[:3])}...")
        lines += [f"published, rebuilt   {reason}" for reason in rebuilt.reasons]
        lines += [] if rebuilt.reasons else ["nothing recorded differs between the two builds"]
    return "\n".join(lines)
