"""The subspace that is removed: extracted at the selected layers, or tuned from that.

The stage writes it to work/directions.safetensors, beside the directions of all layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Artefact, Stage
from abliterator.pipeline.stages.capture import fitted
from abliterator.pipeline.stages.selection import extracted_subspace, selected_layers
from abliterator.pipeline.stages.tuning import tuned_inputs, tuned_subspace

if TYPE_CHECKING:
    from abliterator.directions import Subspace

SUBSPACE = Artefact("directions", "work/directions.safetensors")


def removed_subspace(run: Run) -> Subspace:
    """The subspace that is removed from the weights."""
    from abliterator.directions import load_subspace

    return load_subspace(SUBSPACE.checked(run))


def _key(run: Run) -> Any:
    settings = run.section("directions")
    return [run.digest("capture"), settings, selected_layers(run), tuned_inputs(run)]


def _run(run: Run) -> list[Path]:
    from abliterator.directions import save_directions

    selected = selected_layers(run)
    subspace = tuned_subspace(run, selected.layers) or extracted_subspace(run)
    save_directions(SUBSPACE.path(run), fitted(run)[selected.places[0].position], subspace)
    return [SUBSPACE.path(run)]


DIRECTIONS = Stage("directions", 2, _key, _run)
