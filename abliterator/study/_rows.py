"""The rows of a study: the base, and edits that are measured beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from abliterator.engines import Edit
from abliterator.evaluation import EditEvaluator, MeasuredEdit
from abliterator.judge import summarise
from abliterator.record import StudyRow

Contrast = Literal["generic", "paired"]


class NamedEdit(NamedTuple):
    """An edit that a study measures, and how its row is labelled."""

    name: str
    edit: Edit
    layers: tuple[int, ...] = ()
    contrast: Contrast | None = None
    alpha: float | None = None
    scale: float | None = None
    of: str | None = None
    k: int | None = None


def measured_rows(evaluator: EditEvaluator, edits: Sequence[NamedEdit]) -> tuple[StudyRow, ...]:
    """The base and every edit."""
    rows = [edit_row(evaluator, edit, evaluator.measure(edit.name, edit.edit)) for edit in edits]
    return (base_row(evaluator), *rows)


def edit_row(evaluator: EditEvaluator, edit: NamedEdit, measured: MeasuredEdit) -> StudyRow:
    """The row of an edit, with its difference from the base."""
    base, edited = evaluator.base.verdicts, measured.judged.verdicts
    behaviour = summarise(base, edited, seed=evaluator.context.seed)
    return StudyRow(
        name=edit.name,
        layers=edit.layers,
        contrast=edit.contrast,
        alpha=edit.alpha,
        scale=edit.scale,
        of=edit.of,
        k=edit.k,
        answers=behaviour.edited,
        delta=behaviour.delta,
        divergence=measured.divergence,
    )


def base_row(evaluator: EditEvaluator) -> StudyRow:
    """The row of the base, without an edit."""
    base = evaluator.base.verdicts
    return StudyRow(name="base", answers=summarise(base, base, seed=evaluator.context.seed).base)
