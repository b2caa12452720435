"""How the edited tensors of a quantised checkpoint can be stored: bytes, leak and noise of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from abliterator.bake import EditPlan
from abliterator.checkpoint import Checkpoint
from abliterator.formats import Way, measured
from abliterator.record import QuantizedEdits, TensorEdit

WAYS: tuple[Way, ...] = ("keep", "dequantize")


def storage_ways(edits: EditPlan, checkpoint: Checkpoint, k: int) -> list[dict[str, Any]]:
    """Bytes, leak and noise of both storages, for each quantised format among the edited tensors.

    Leak and noise are constants (`formats.measured`), bytes are this model's: of
    all weights, if every edited tensor that is quantised is stored in this way.

    Args:
        edits: the plan.
        checkpoint: the base.
        k: rank of the edit; 0 where it is not known yet.
    """
    formats = []
    for kind in dict.fromkeys(edit.layout.kind for edit in edits.edits if edit.layout.quantized):
        members = [edit for edit in edits.edits if edit.layout.kind == kind]
        entry: dict[str, Any] = {
            "format": kind,
            "tensors": len(members),
            "way": WAYS[members[0].dequantizes],
        }
        for way in WAYS:
            size = checkpoint.total_bytes + edits.stored_as(way).added_bytes(checkpoint)
            rank, constants = measured(kind, way, k) or (None, None)
            entry[way] = {
                "bytes": size,
                "k": rank,
                "leak": constants and constants.leak,
                "noise": constants and constants.noise,
            }
        formats.append(entry)
    return formats


def quantized_edits(edits: Sequence[TensorEdit]) -> tuple[QuantizedEdits, ...]:
    """What was measured of the edited tensors that the base has in quantised formats, by format."""
    summaries = []
    for kind in dict.fromkeys(edit.storage for edit in edits if edit.storage is not None):
        members = [edit for edit in edits if edit.storage == kind]
        leaks = [edit.leak for edit in members if edit.leak is not None]
        summaries.append(
            QuantizedEdits(
                format=kind,
                tensors=len(members),
                dequantized=members[0].dequantized,
                max_leak=max(leaks, default=None),
                noise=_rms([edit.noise for edit in members]),
                noise_nearest=_rms([edit.noise_nearest for edit in members]),
            )
        )
    return tuple(summaries)


def _rms(values: Sequence[float | None]) -> float | None:
    """The root mean square of the values that are not None; None if there are none."""
    squares = [value**2 for value in values if value is not None]
    return (sum(squares) / len(squares)) ** 0.5 if squares else None
