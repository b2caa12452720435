"""Estimators and stacks side by side: the same prompts, layers and strengths, one edit each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from abliterator.bake import EditPlan
from abliterator.evaluation import EditEvaluator, MeasuredEdit
from abliterator.judge import summarise
from abliterator.record import DirectionCosines, EditDifference, Estimate, Study, StudyRow
from abliterator.statistics import paired_delta
from abliterator.study._controls import matched_edit, random_like, scaled_edit
from abliterator.study._rows import NamedEdit, base_row, edit_row, measured_rows


class EstimatedEdit(NamedTuple):
    """A subspace that a study measures.

    Attributes:
        name: of the estimator and the stack.
        basis: Q [H, k], or [L, H, k] with one a block.
        layers: residual layers whose directions it has.
        plan: of an edit that has strengths of its own; else the evaluator's.
    """

    name: str
    basis: Tensor
    layers: tuple[int, ...]
    plan: EditPlan | None = None


def study_estimators(
    evaluator: EditEvaluator,
    estimated: Sequence[EstimatedEdit],
    *,
    scales: Sequence[float] = (1.0,),
    draws: int = 3,
    cosines: Mapping[str, Tensor] | None = None,
) -> Study:
    """Every subspace removed at the plan's strengths or its own, and each less the first.

    Args:
        evaluator: the base, measured.
        estimated: the subspaces.
        scales: factors on the strengths, at each of which every subspace is removed.
        draws: of random directions like the first, at its strengths and at its KL with the largest
            of the factors.
        cosines: by name, the cosines [L] of an estimate with the first one's directions.
    """
    context, rows = evaluator.context, [base_row(evaluator)]
    differences: list[EditDifference] = []
    for scale in scales:
        reference: MeasuredEdit | None = None
        for entry in estimated:
            edit = scaled_edit(entry.plan or context.plan, entry.basis, scale)
            name = entry.name if len(scales) == 1 else f"{entry.name}, strength x {scale:g}"
            named_edit = NamedEdit(
                name, edit, entry.layers, scale=scale, of=entry.name, k=entry.basis.shape[-1]
            )
            measured = evaluator.measure(name, edit)
            rows.append(edit_row(evaluator, named_edit, measured))
            if reference is None:
                reference = measured
            else:
                differences.append(_difference(name, reference, measured, context.seed))
    rows += _random_rows(evaluator, estimated[0].basis, rows, max(scales), draws)
    return Study(
        name="estimators",
        asks="Which estimate of the direction removes most, and costs least?",
        rows=tuple(rows),
        compared_with=estimated[0].name,
        edit_differences=tuple(differences),
        cosines=tuple(
            DirectionCosines(name=name, cosines=tuple(float(cosine) for cosine in of_layers))
            for name, of_layers in (cosines or {}).items()
        ),
    )


def _random_rows(
    evaluator: EditEvaluator, like: Tensor, rows: Sequence[StudyRow], scale: float, draws: int
) -> list[StudyRow]:
    """Random directions at a factor on the strengths, and at the KL of the first row with it."""
    kl = next(row.divergence.kl for row in rows if row.divergence and row.scale == scale)
    random: list[StudyRow] = []
    for draw in range(draws):
        basis, name = random_like(like, draw), f"random directions {draw + 1}"
        edits = [NamedEdit(name, scaled_edit(evaluator.context.plan, basis, scale), scale=scale)]
        if kl and kl.value > 0:
            edits.append(matched_edit(evaluator, basis, kl.value, name=name))
        random += measured_rows(evaluator, edits)[1:]
    return random


def _difference(
    name: str, reference: MeasuredEdit, measured: MeasuredEdit, seed: int
) -> EditDifference:
    """An edit less the reference, prompt by prompt."""

    def paired(values: Sequence[Sequence[float]]) -> Estimate | None:
        return Estimate.of(paired_delta(*values, seed=seed))

    sides = (reference, measured)
    return EditDifference(
        name=name,
        delta=summarise(*(side.judged.verdicts for side in sides), seed=seed).delta,
        kl_first_token=paired([[float(path.kl[0]) for path in side.paths] for side in sides]),
        kl=paired([[float(path.kl.mean()) for path in side.paths] for side in sides]),
    )
