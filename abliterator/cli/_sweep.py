"""The command that chooses layers and k, and shows on what evidence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from abliterator.cli._options import JSON, read_recipe, recipe_arguments
from abliterator.cli._show import Bars
from abliterator.errors import RecipeError

COLUMNS = ("layer", "bypass", "KL", "induce", "compliance", "coherence", "product")


@click.command()
@recipe_arguments()
@JSON
def sweep(recipe: Path, as_json: bool, **where: Any) -> None:
    """Choose layers and k by measurement, for a RECIPE with `layers: sweep` or `k: auto`."""
    from abliterator import pipeline

    read, out, options = read_recipe(recipe, **where)
    if not read.selects:
        raise RecipeError(
            f"The recipe names its layers ({', '.join(map(str, read.layers))}) and k ({read.k}), "
            f"so there is nothing to choose. Ask with --set layers=sweep, --set k=auto, or both."
        )
    pipeline.run_stages(read, out, until="selection", options=options, progress=Bars())
    text = (out / "work" / "sweep.json").read_text()
    click.echo(text.rstrip() if as_json else told(json.loads(text)))


def told(found: dict[str, Any]) -> str:
    """A selection as tables and two sentences."""
    base = found["base"]
    rows = [["base", f"{base['bypass']:.3f}", "", "", *_judged(base["answers"])]]
    for c in found["candidates"]:
        stopped = " ".join(f"({gate})" for gate in c["stopped_by"])
        scores = [f"{c[name]:.3f}" for name in ("bypass", "kl", "induce")]
        judged = [stopped, "", ""] if stopped else _judged(c["answers"])
        rows.append([str(c["layer"]), *scores, *judged])
    lines = _table([list(COLUMNS), *rows])
    if found["stacks"]:
        stacks = [["k", "KL", "compliance", "coherence", "product", "product, random directions"]]
        for s in found["stacks"]:
            random = s["random"]["product"]
            judged = [*_judged(s["answers"]), f"{random['value']:.3f}"]
            stacks.append([str(s["k"]), f"{s['kl']:.3f}", *judged])
        lines += ["", *_table(stacks)]
    layers = ", ".join(map(str, found["layers"][: found["k"]]))
    structure = found["structure"]
    lines += ["", f"chosen: layers {layers}; k = {found['k']}: {found['why']}"]
    lines.append(f"{structure['verdict']}: {structure['because']}")
    return "\n".join(lines)


def _judged(answers: dict[str, Any] | None) -> list[str]:
    if answers is None:
        return ["", "", ""]
    found = (answers[name] for name in ("compliance", "coherence", "product"))
    return ["not measured" if e is None else f"{e['value']:.3f}" for e in found]


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
