"""The layers that are stacked: the recipe's, or those that the selection stage chose."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from abliterator.files import read_text
from abliterator.pipeline._run import Run

if TYPE_CHECKING:
    from abliterator.directions import Place


def sweep_path(run: Run) -> Path:
    """Where the selection stage leaves what it found."""
    return run.workspace.work / "sweep.json"


def selection_of(run: Run) -> dict[str, Any] | None:
    """What the selection stage found, as plain values; None where the recipe chose."""
    if not run.recipe.selects:
        return None
    found: dict[str, Any] = json.loads(read_text(run.artefact("selection", sweep_path(run))))
    return found


class Chosen(NamedTuple):
    """What is removed.

    Attributes:
        places: layer and position of each direction, in order of preference; one alone where all
            directions are of one layer.
        k: directions that are removed from what a block writes.
    """

    places: tuple[Place, ...]
    k: int

    @property
    def layers(self) -> tuple[int, ...]:
        """The residual layers."""
        return tuple(place.layer for place in self.places)

    @property
    def positions(self) -> tuple[int, ...]:
        """Their positions, each once, the last token's first."""
        return tuple(sorted({place.position for place in self.places}, reverse=True))


def chosen(run: Run) -> Chosen:
    """The directions that are removed: the recipe's, or those that the selection stage chose."""
    return chosen_of(run, selection_of(run))


def chosen_of(run: Run, found: Mapping[str, Any] | None) -> Chosen:
    """The same of what a selection found, None where the recipe chose."""
    from abliterator.directions import Place

    position = run.recipe.directions.position
    if found is not None:
        k, layers, positions = found["k"], found["layers"], found["positions"]
    else:
        k, layers, positions = run.plan.k, run.plan.layers, [position] * len(run.plan.layers)
    n = {"within_layer": 1, "per_layer": len(layers)}.get(run.recipe.directions.stack, k)
    return Chosen(tuple(map(Place, layers[:n], positions[:n])), k)
