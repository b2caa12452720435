"""The layers that are stacked: the recipe's, or those that the selection stage chose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from abliterator.pipeline._run import Run


def sweep_path(run: Run) -> Path:
    """Where the selection stage leaves what it found."""
    return run.workspace.work / "sweep.json"


def selection_of(run: Run) -> dict[str, Any] | None:
    """What the selection stage found, as plain values; None where the recipe chose."""
    if not run.recipe.selects:
        return None
    found: dict[str, Any] = json.loads(sweep_path(run).read_text())
    return found


def chosen_layers(run: Run) -> tuple[int, ...]:
    """The residual layers whose directions are removed, in order of preference."""
    found = selection_of(run)
    if found is None:
        return run.plan.layers[: run.plan.k]
    return tuple(found["layers"][: found["k"]])
