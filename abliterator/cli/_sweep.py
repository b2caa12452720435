"""`abliterator sweep`: layers, positions and k, with the measurements that chose them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from abliterator.cli._options import JSON, bars_of, read_recipe, recipe_arguments
from abliterator.cli._terminal import show
from abliterator.errors import RecipeError
from abliterator.files import read_text
from abliterator.record import AnswerSummary, Selection
from abliterator.tables import cell, terminal_table

COLUMNS = ("bypass", "KL", "induce", "prompts", "compliance", "coherence", "product")


@click.command()
@recipe_arguments()
@JSON
def sweep(recipe: Path, as_json: bool, **arguments: Any) -> None:
    """Choose layers, positions and k by measurement.

    For a RECIPE with `layers: sweep`, `directions: {position: sweep}` or `k: auto`.
    """
    from abliterator import pipeline

    parsed, out, options = read_recipe(recipe, **arguments)
    if not parsed.selects:
        raise RecipeError(
            f"The recipe names its layers ({', '.join(map(str, parsed.layers))}) and k "
            f"({parsed.k}), so there is nothing to choose. Ask with --set layers=sweep, --set "
            "k=auto, or both."
        )
    pipeline.run_stages(
        parsed,
        out,
        until="selection",
        options=options,
        progress=bars_of(parsed, out, options, "selection"),
    )
    selection = Selection.model_validate_json(read_text(out / "work" / "sweep.json"))
    show(selection, _selection_text, as_json=as_json)


def _selection_text(selection: Selection) -> str:
    """A selection as tables and two sentences."""
    base, candidates, stacks = selection.base, selection.candidates, selection.stacks
    at_last_token = {c.position for c in candidates} <= {-1}
    table = [["layer", "position", *COLUMNS]]
    table.append(["base", "", f"{base.bypass:.3f}", "", "", *_answer_cells(base.answers)])
    for c in candidates:
        stopped = " ".join(f"({gate})" for gate in c.stopped_by)
        scores = [f"{score:.3f}" for score in (c.bypass, c.kl, c.induce)]
        judged = [stopped, "", "", ""] if stopped else _answer_cells(c.answers)
        table.append([c.name, str(c.position), *scores, *judged])
    lines = terminal_table([[row[0], *row[2:]] for row in table] if at_last_token else table, ">")
    if stacks:
        rows = [["k", "KL", *COLUMNS[3:], "product, random", "product, shuffled labels"]]
        for s in stacks:
            controls = [
                _control_cell(s.random, s.random_kl),
                _control_cell(s.shuffled, s.shuffled_kl),
            ]
            rows.append([str(s.k), f"{s.kl:.3f}", *_answer_cells(s.answers), *controls])
        lines += ["", *terminal_table(rows, ">")]
    places = zip(selection.layers, selection.positions, strict=True)
    place_names = [
        str(layer) if position == -1 else f"{layer} at {position}" for layer, position in places
    ]
    if selection.nodes:
        place_names = [
            f"{name} node {node}" for name, node in zip(place_names, selection.nodes, strict=True)
        ]
    structure, k = selection.structure, selection.k
    first = min(len(stacks[-1].layers), k) if stacks else k
    lines += ["", f"chosen: layers {', '.join(place_names[:first])}; k = {k}: {selection.why}"]
    lines.append(f"{structure.verdict}: {structure.because}")
    return "\n".join(lines)


def _answer_cells(answers: AnswerSummary | None) -> list[str]:
    if answers is None:
        return ["", "", "", ""]
    means = (answers.compliance, answers.coherence, answers.product)
    largest = max(
        (mean for mean in means if mean is not None), key=lambda mean: mean.n, default=None
    )
    return [largest.counts if largest else "0", *(cell(mean and mean.value) for mean in means)]


def _control_cell(answers: AnswerSummary | None, kl: float | None) -> str:
    if answers is None:
        return ""
    return _answer_cells(answers)[-1] + ("" if kl is None else f" (KL {kl:.3f})")
