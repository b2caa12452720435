"""Studies of edits: the contrast, the strength, the number of directions, and controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from abliterator.directions import Directions, Place, Position, stack, stack_at
from abliterator.engines import Edit, StreamEdit
from abliterator.evaluation import EditEvaluator, MeasuredEdit
from abliterator.judge import summarise
from abliterator.record import ContrastDifference, Study, StudyRow
from abliterator.subspace import is_by_writer, random_basis

Contrast = Literal["generic", "paired"]
CONTRASTS: tuple[Contrast, Contrast] = ("generic", "paired")
STACKS = (3, 5)  # of the best layers, after each of the first five alone
SINGLE = 5


class NamedEdit(NamedTuple):
    """An edit that a study measures, and how its row is labelled."""

    name: str
    edit: Edit
    layers: tuple[int, ...] = ()
    contrast: Contrast | None = None
    alpha: float | None = None


def study_pairs(
    evaluator: EditEvaluator, directions: Mapping[Contrast, Directions], layers: Sequence[int]
) -> Study:
    """Each layer's direction from a generic and from a paired contrast, removed alone.

    Args:
        evaluator: the base, measured.
        directions: from the same target prompts, by what was subtracted: neutral prompts at large,
            or prompts like target that do not show the behaviour.
        layers: residual layers, 1 .. n_layers.
    """
    context = evaluator.context
    rows, differences = [_base_row(evaluator)], []
    for layer in layers:
        measured: dict[Contrast, MeasuredEdit] = {}
        for contrast in CONTRASTS:
            edit = context.writer_edit(stack(directions[contrast], (layer,)).basis)
            named_edit = NamedEdit(f"layer {layer}, {contrast}", edit, (layer,), contrast)
            measured[contrast] = evaluator.measure(named_edit.name, edit)
            rows.append(_row(evaluator, named_edit, measured[contrast]))
        sides = [measured[contrast].judged.verdicts for contrast in CONTRASTS]
        generic, paired = (directions[contrast].vectors[layer - 1] for contrast in CONTRASTS)
        differences.append(
            ContrastDifference(
                layer=layer,
                cosine=float(torch.cosine_similarity(generic, paired, dim=0)),
                delta=summarise(*sides, seed=context.seed).delta,
            )
        )
    return Study(
        name="pairs",
        asks="Is a contrast of paired prompts better than prompts at large?",
        rows=tuple(rows),
        differences=tuple(differences),
    )


def study_alpha(evaluator: EditEvaluator, basis: Tensor, alphas: Sequence[float]) -> Study:
    """The intervention h <- h - alpha Q Qᵀ h on the output of every block.

    Args:
        evaluator: the base, measured.
        basis: Q [H, k].
        alphas: 0 is the base, 1 removes.
    """
    edits = [
        NamedEdit(f"alpha {alpha:g}", StreamEdit(basis, alpha), alpha=alpha) for alpha in alphas
    ]
    return Study(
        name="alpha",
        asks="How much of the subspace has to be taken out of the stream, at every block?",
        rows=_rows(evaluator, edits),
    )


def study_confirmation(
    evaluator: EditEvaluator, directions: Mapping[Position, Directions], places: Sequence[Place]
) -> Study:
    """The first places one by one, then stacked by 3 and by 5, then the directions of all layers.

    Args:
        evaluator: the base, measured.
        directions: by position of the prompt, one a layer.
        places: in order of preference; stacks of more places than these are left out. All layers
            are taken at the position of the first.
    """
    position = places[0].position
    n_layers = len(directions[position].vectors)
    stacks = [(f"layer {place}", [place]) for place in places[:SINGLE]]
    stacks += [(f"top {k}", list(places[:k])) for k in STACKS if k <= len(places)]
    stacks.append(("all layers", [Place(layer, position) for layer in range(1, n_layers + 1)]))
    edits = []
    for name, stack_places in stacks:
        subspace = stack_at(directions, stack_places)
        edit = evaluator.context.writer_edit(subspace.basis)
        edits.append(NamedEdit(name, edit, subspace.layers))
    return Study(
        name="confirmation",
        asks="Is one direction enough, or does it take several?",
        rows=_rows(evaluator, edits),
    )


def study_controls(
    evaluator: EditEvaluator, basis: Tensor, shuffled: Sequence[Tensor], *, draws: int
) -> Study:
    """The edit itself, and the same edit along directions that are independent of the behaviour.

    Every writer keeps its strength. If random directions have the same effect, the behaviour is
    unstable, and the effect is not that of the direction.

    Args:
        evaluator: the base, measured.
        basis: Q [H, k], or [L, H, k] with one a block, or pairs [M, 2, H, r], which get separate
            draws; of pairs U = V then.
        shuffled: Q of directions from shuffled labels, one a draw; may be none.
        draws: of random directions.
    """
    bases = [("the edit", basis)]
    bases += [(f"random directions {i + 1}", _random_like(basis, i)) for i in range(draws)]
    bases += [(f"shuffled labels {i}", other) for i, other in enumerate(shuffled, start=1)]
    edits = [NamedEdit(name, evaluator.context.writer_edit(other)) for name, other in bases]
    return Study(
        name="controls",
        asks="Is it these directions, or does any edit of this size do the same?",
        rows=_rows(evaluator, edits),
    )


def _random_like(basis: Tensor, draw: int) -> Tensor:
    """Random directions of the same shape; a block's own where each block has its own."""
    d_model, k = basis.shape[-2:]
    if basis.ndim == 2:
        return random_basis(d_model, k, seed=draw)
    seeds = range(draw * len(basis), (draw + 1) * len(basis))
    bases = torch.stack([random_basis(d_model, k, seed=seed) for seed in seeds])
    return torch.stack([bases, bases], dim=1) if is_by_writer(basis) else bases


def confirmation_edits(n_given: int) -> int:
    """How many edits `study_confirmation` measures for so many layers."""
    return min(SINGLE, n_given) + sum(k <= n_given for k in STACKS) + 1


def _rows(evaluator: EditEvaluator, edits: Sequence[NamedEdit]) -> tuple[StudyRow, ...]:
    """The base and every edit."""
    rows = [_row(evaluator, edit, evaluator.measure(edit.name, edit.edit)) for edit in edits]
    return (_base_row(evaluator), *rows)


def _row(evaluator: EditEvaluator, edit: NamedEdit, measured: MeasuredEdit) -> StudyRow:
    """The row of an edit, with its difference from the base."""
    base, edited = evaluator.base.verdicts, measured.judged.verdicts
    behaviour = summarise(base, edited, seed=evaluator.context.seed)
    return StudyRow(
        name=edit.name,
        layers=edit.layers,
        contrast=edit.contrast,
        alpha=edit.alpha,
        answers=behaviour.edited,
        delta=behaviour.delta,
        divergence=measured.divergence,
    )


def _base_row(evaluator: EditEvaluator) -> StudyRow:
    base = evaluator.base.verdicts
    return StudyRow(name="base", answers=summarise(base, base, seed=evaluator.context.seed).base)
