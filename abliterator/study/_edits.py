"""Studies of edits: the contrast, the strength, and the number of directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from abliterator.directions import Directions, Place, Position, stack, stack_at
from abliterator.engines import StreamEdit
from abliterator.evaluation import EditEvaluator, MeasuredEdit
from abliterator.judge import summarise
from abliterator.record import ContrastDifference, Study
from abliterator.study._rows import Contrast, NamedEdit, base_row, edit_row, measured_rows

CONTRASTS: tuple[Contrast, Contrast] = ("generic", "paired")
STACKS = (3, 5)  # of the best layers, after each of the first five alone
SINGLE = 5


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
    rows, differences = [base_row(evaluator)], []
    for layer in layers:
        measured: dict[Contrast, MeasuredEdit] = {}
        for contrast in CONTRASTS:
            edit = context.writer_edit(stack(directions[contrast], (layer,)).basis)
            named_edit = NamedEdit(f"layer {layer}, {contrast}", edit, (layer,), contrast)
            measured[contrast] = evaluator.measure(named_edit.name, edit)
            rows.append(edit_row(evaluator, named_edit, measured[contrast]))
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
        rows=measured_rows(evaluator, edits),
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
        rows=measured_rows(evaluator, edits),
    )


def confirmation_edits(n_given: int) -> int:
    """How many edits `study_confirmation` measures for so many layers."""
    return min(SINGLE, n_given) + sum(k <= n_given for k in STACKS) + 1
