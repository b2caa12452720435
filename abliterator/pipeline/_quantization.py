"""How the edited tensors of a quantised checkpoint can be stored, and what each way costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from abliterator.bake import EditPlan
from abliterator.checkpoint import Checkpoint
from abliterator.formats import MEASURED, Way, measured
from abliterator.record import QuantizedEdits, TensorEdit

WAYS: tuple[Way, ...] = ("keep", "dequantize")


def storage_ways(edits: EditPlan, checkpoint: Checkpoint, k: int) -> list[dict[str, Any]]:
    """For each quantised format among the edited tensors: what is done, and what else could be.

    Leak and noise are constants (`formats.MEASURED`, with their source), bytes are this model's: of
    all weights, if every edited tensor that is quantised is stored in this way.

    Args:
        edits: the plan.
        checkpoint: the base.
        k: rank of the edit; 0 where it is not known yet.
    """
    found = []
    for kind in dict.fromkeys(edit.layout.kind for edit in edits.edits if edit.layout.quantized):
        these = [edit for edit in edits.edits if edit.layout.kind == kind]
        told: dict[str, Any] = {
            "format": kind,
            "tensors": len(these),
            "way": WAYS[these[0].dequantizes],
        }
        for way in WAYS:
            size = checkpoint.total_bytes + edits.stored_as(way).added_bytes(checkpoint)
            told[way] = {"bytes": size, **_constants(kind, way, k)}
        found.append(told)
    return found


def _constants(kind: str, way: Way, k: int) -> dict[str, Any]:
    if kind not in MEASURED:
        return {"k": None, "leak": None, "noise": None}
    rank, constants = measured(kind, way, k)
    return {"k": rank, "leak": constants.leak, "noise": constants.noise}


def quantized_edits(edits: Sequence[TensorEdit]) -> tuple[QuantizedEdits, ...]:
    """What was measured of the edited tensors that the base has in quantised formats, by format."""
    found = []
    for kind in dict.fromkeys(edit.storage for edit in edits if edit.storage is not None):
        these = [edit for edit in edits if edit.storage == kind]
        leaks = [edit.leak for edit in these if edit.leak is not None]
        found.append(
            QuantizedEdits(
                format=kind,
                tensors=len(these),
                dequantized=these[0].dequantized,
                max_leak=max(leaks, default=None),
                noise=_rms([edit.noise for edit in these]),
                noise_nearest=_rms([edit.noise_nearest for edit in these]),
            )
        )
    return tuple(found)


def _rms(values: Sequence[float | None]) -> float | None:
    known = [value**2 for value in values if value is not None]
    return (sum(known) / len(known)) ** 0.5 if known else None
