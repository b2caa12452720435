"""The command that chooses layers and k, and shows on what evidence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from abliterator.cli._options import JSON, read_recipe, recipe_arguments
from abliterator.cli._print import echo
from abliterator.cli._terminal import Bars
from abliterator.errors import RecipeError
from abliterator.files import read_text

COLUMNS = ("bypass", "KL", "induce", "prompts", "compliance", "coherence", "product")


@click.command()
@recipe_arguments()
@JSON
def sweep(recipe: Path, as_json: bool, **where: Any) -> None:
    """Choose layers, positions and k by measurement.

    For a RECIPE with `layers: sweep`, `directions: {position: sweep}` or `k: auto`.
    """
    from abliterator import pipeline

    read, out, options = read_recipe(recipe, **where)
    if not read.selects:
        raise RecipeError(
            f"The recipe names its layers ({', '.join(map(str, read.layers))}) and k ({read.k}), "
            f"so there is nothing to choose. Ask with --set layers=sweep, --set k=auto, or both."
        )
    pipeline.run_stages(read, out, until="selection", options=options, progress=Bars())
    found = json.loads(read_text(out / "work" / "sweep.json"))
    echo(json.dumps(found, indent=1) if as_json else told(found))


def told(found: dict[str, Any]) -> str:
    """A selection as tables and two sentences."""
    base = found["base"]
    at_last_token = {c["position"] for c in found["candidates"]} <= {-1}
    rows = [["", f"{base['bypass']:.3f}", "", "", *_judged(base["answers"])]]
    for c in found["candidates"]:
        stopped = " ".join(f"({gate})" for gate in c["stopped_by"])
        scores = [f"{c[name]:.3f}" for name in ("bypass", "kl", "induce")]
        judged = [stopped, "", "", ""] if stopped else _judged(c["answers"])
        rows.append([str(c["position"]), *scores, *judged])
    names = ["base", *(str(c["layer"]) for c in found["candidates"])]
    table = [["layer", "position", *COLUMNS]]
    table += [[name, *row] for name, row in zip(names, rows, strict=True)]
    lines = _table([[row[0], *row[2:]] for row in table] if at_last_token else table)
    if found["stacks"]:
        stacks = [["k", "KL", *COLUMNS[3:], "product, random", "product, shuffled labels"]]
        for s in found["stacks"]:
            controls = [_control(s, name) for name in ("random", "shuffled")]
            stacks.append([str(s["k"]), f"{s['kl']:.3f}", *_judged(s["answers"]), *controls])
        lines += ["", *_table(stacks)]
    places = zip(found["layers"], found["positions"], strict=True)
    taken = [str(layer) if at == -1 else f"{layer} at {at}" for layer, at in places]
    structure = found["structure"]
    first = len(found["stacks"][-1]["layers"]) if found["stacks"] else found["k"]
    lines += ["", f"chosen: layers {', '.join(taken[: min(first, found['k'])])}; k = {found['k']}"]
    lines[-1] += f": {found['why']}"
    lines.append(f"{structure['verdict']}: {structure['because']}")
    return "\n".join(lines)


def _judged(answers: dict[str, Any] | None) -> list[str]:
    if answers is None:
        return ["", "", "", ""]
    found = [answers[name] for name in ("compliance", "coherence", "product")]
    n = max((e["n"] for e in found if e is not None), default=0)
    return [str(n), *("not measured" if e is None else f"{e['value']:.3f}" for e in found)]


def _control(stack: dict[str, Any], name: str) -> str:
    if stack[name] is None:
        return ""
    kl = stack.get(f"{name}_kl")
    return _judged(stack[name])[-1] + ("" if kl is None else f" (KL {kl:.3f})")


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
