"""What tuning left, and which point of it is baked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterator.bake import EditPlan
from abliterator.files import read_text
from abliterator.pipeline._run import Run

if TYPE_CHECKING:
    from abliterator.directions import Subspace


def tuning_path(run: Run) -> Path:
    """Where the tuning stage leaves its points, and the strengths of each."""
    return run.workspace.work / "tuning.json"


def tuned_bases_path(run: Run) -> Path:
    """Where it leaves `bases` [points, H, k] in the same order."""
    return run.workspace.work / "tuning.safetensors"


def tuning_of(run: Run) -> dict[str, Any] | None:
    """What the tuning stage found and which point the recipe prefers; None where nothing is tuned.

    Raises:
        DirectionError: if no point keeps the recipe's limit.
    """
    from abliterator.tuning import Point, prefer

    if not run.recipe.tunes:
        return None
    found: dict[str, Any] = json.loads(read_text(run.artefact("tuning", tuning_path(run))))
    wanted, max_kl = run.recipe.tuning, run.recipe.selection.max_kl
    points = [Point.model_validate(point) for point in found["points"]]
    found["taken"] = prefer(points, wanted.prefer, wanted.at_most, max_kl=max_kl)
    return found


def tuning_record(run: Run) -> dict[str, Any] | None:
    """The same for the record, without the strengths, which are in edits.json."""
    found = tuning_of(run)
    return found and {name: value for name, value in found.items() if name != "strengths"}


def tuned_subspace(run: Run, layers: tuple[int, ...]) -> Subspace | None:
    """The subspace of the point that is taken; None where nothing is tuned."""
    from safetensors.torch import load_file

    from abliterator.directions import Subspace

    found = tuning_of(run)
    if found is None:
        return None
    bases = load_file(run.artefact("tuning", tuned_bases_path(run)))["bases"]
    return Subspace(bases[found["taken"]], layers)


def planned_edits(run: Run) -> EditPlan:
    """Which tensors are edited and how strongly: the plan's, at tuned strengths where asked for."""
    found = tuning_of(run)
    if found is None:
        return run.plan.edits
    return run.plan.edits.with_strengths(found["strengths"][found["taken"]])


def tuned_inputs(run: Run) -> Any:
    """What an artefact that depends on the point that is taken depends on."""
    found = tuning_of(run)
    return found and [run.digest("tuning"), found["taken"]]
