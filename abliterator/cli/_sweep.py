"""`abliterator sweep`: layers, positions and k, and on what evidence they were chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from abliterator.cli._options import JSON, read_recipe, recipe_arguments
from abliterator.cli._terminal import Bars, show
from abliterator.errors import RecipeError
from abliterator.files import read_text
from abliterator.tables import cell, terminal_table

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
    selection = json.loads(read_text(out / "work" / "sweep.json"))
    show(selection, _selection_text, as_json=as_json)


def _selection_text(selection: dict[str, Any]) -> str:
    """A selection as tables and two sentences."""
    base = selection["base"]
    at_last_token = {c["position"] for c in selection["candidates"]} <= {-1}
    rows = [["", f"{base['bypass']:.3f}", "", "", *_judged(base["answers"])]]
    for c in selection["candidates"]:
        stopped = " ".join(f"({gate})" for gate in c["stopped_by"])
        scores = [f"{c[name]:.3f}" for name in ("bypass", "kl", "induce")]
        judged = [stopped, "", "", ""] if stopped else _judged(c["answers"])
        rows.append([str(c["position"]), *scores, *judged])
    names = ["base", *(str(c["layer"]) for c in selection["candidates"])]
    table = [["layer", "position", *COLUMNS]]
    table += [[name, *row] for name, row in zip(names, rows, strict=True)]
    lines = terminal_table([[row[0], *row[2:]] for row in table] if at_last_token else table, ">")
    if selection["stacks"]:
        stacks = [["k", "KL", *COLUMNS[3:], "product, random", "product, shuffled labels"]]
        for s in selection["stacks"]:
            controls = [_control(s, name) for name in ("random", "shuffled")]
            stacks.append([str(s["k"]), f"{s['kl']:.3f}", *_judged(s["answers"]), *controls])
        lines += ["", *terminal_table(stacks, ">")]
    places = zip(selection["layers"], selection["positions"], strict=True)
    named = [str(layer) if at == -1 else f"{layer} at {at}" for layer, at in places]
    structure, k = selection["structure"], selection["k"]
    first = min(len(selection["stacks"][-1]["layers"]), k) if selection["stacks"] else k
    lines += ["", f"chosen: layers {', '.join(named[:first])}; k = {k}: {selection['why']}"]
    lines.append(f"{structure['verdict']}: {structure['because']}")
    return "\n".join(lines)


def _judged(answers: dict[str, Any] | None) -> list[str]:
    if answers is None:
        return ["", "", "", ""]
    means = [answers[name] for name in ("compliance", "coherence", "product")]
    n = max((e["n"] for e in means if e is not None), default=0)
    return [str(n), *(cell(e and e["value"]) for e in means)]


def _control(stack: dict[str, Any], name: str) -> str:
    if stack[name] is None:
        return ""
    kl = stack.get(f"{name}_kl")
    return _judged(stack[name])[-1] + ("" if kl is None else f" (KL {kl:.3f})")
