"""The studies that edit: from which contrast, how strongly, how many directions, and which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from abliterator.bake import intervene, preview_edit
from abliterator.directions import Directions, Place, stack, stack_at
from abliterator.judge import summarise
from abliterator.study._bench import Bench, Measured
from abliterator.study._types import Difference, Study
from abliterator.subspace import random_basis

Contrast = Literal["generic", "paired"]
CONTRASTS: tuple[Contrast, Contrast] = ("generic", "paired")
STACKS = (3, 5)  # of the best layers, after each of the first five alone
SINGLE = 5


def study_pairs(
    bench: Bench, directions: Mapping[Contrast, Directions], layers: Sequence[int]
) -> Study:
    """Each layer's direction from a generic and from a paired contrast, removed alone.

    Args:
        bench: the base, measured.
        directions: from the same target prompts, by what was subtracted: neutral prompts at large,
            or prompts like target that do not show the behaviour.
        layers: residual layers, 1 .. n_layers.
    """
    rows, differences = [bench.base_row()], []
    for layer in layers:
        found: dict[Contrast, Measured] = {}
        for contrast in CONTRASTS:
            name = f"layer {layer}, {contrast}"
            found[contrast] = _removed(bench, name, stack(directions[contrast], (layer,)).basis)
            rows.append(bench.row(name, found[contrast], layers=(layer,), contrast=contrast))
        sides = [found[contrast].verdicts for contrast in CONTRASTS]
        generic, paired = (directions[contrast].vectors[layer - 1] for contrast in CONTRASTS)
        differences.append(
            Difference(
                layer=layer,
                cosine=float(torch.cosine_similarity(generic, paired, dim=0)),
                delta=summarise(*sides, seed=bench.subject.seed).delta,
            )
        )
    return Study(
        name="pairs",
        asks="Is a contrast of paired prompts better than prompts at large?",
        rows=tuple(rows),
        differences=tuple(differences),
    )


def study_alpha(bench: Bench, basis: Tensor, alphas: Sequence[float]) -> Study:
    """The intervention h <- h - alpha Q Qᵀ h on the output of every block.

    Args:
        bench: the base, measured.
        basis: Q [H, k].
        alphas: 0 is the base, 1 removes.
    """
    subject, rows = bench.subject, [bench.base_row()]
    for alpha in alphas:
        name = f"alpha {alpha:g}"
        edit = intervene(subject.loaded, subject.blocks, basis, alpha)
        rows.append(bench.row(name, bench.measure(name, edit), alpha=alpha))
    return Study(
        name="alpha",
        asks="How much of the subspace has to be taken out of the stream, at every block?",
        rows=tuple(rows),
    )


def study_confirmation(
    bench: Bench, directions: Mapping[int, Directions], places: Sequence[Place]
) -> Study:
    """The first places one by one, then stacked by 3 and by 5, then the directions of all layers.

    Args:
        bench: the base, measured.
        directions: by position of the prompt, one a layer.
        places: in order of preference; stacks that they are too few for are left out. All layers
            are taken at the position of the first.
    """
    position = places[0].position
    n_layers = len(directions[position].vectors)
    tried = [(f"layer {place}", [place]) for place in places[:SINGLE]]
    tried += [(f"top {k}", list(places[:k])) for k in STACKS if k <= len(places)]
    tried.append(("all layers", [Place(layer, position) for layer in range(1, n_layers + 1)]))
    rows = [bench.base_row()]
    for name, stacked in tried:
        subspace = stack_at(directions, stacked)
        rows.append(bench.row(name, _removed(bench, name, subspace.basis), layers=subspace.layers))
    return Study(
        name="confirmation",
        asks="Is one direction enough, or does it take several?",
        rows=tuple(rows),
    )


def study_controls(bench: Bench, basis: Tensor, shuffled: Sequence[Tensor], *, draws: int) -> Study:
    """The edit itself, and the same edit along directions that know nothing of the behaviour.

    Every writer keeps its strength. If random directions do what the edit does, the behaviour hangs
    by a thread, and it was not the direction that ended it.

    Args:
        bench: the base, measured.
        basis: Q [H, k], or [L, H, k] with one a block, which then get draws of their own.
        shuffled: Q of directions from shuffled labels, one a draw; may be none.
        draws: of random directions.
    """
    rows = [bench.base_row(), bench.row("the edit", _removed(bench, "the edit", basis))]
    tried = [(f"random directions {i + 1}", _random_like(basis, i)) for i in range(draws)]
    tried += [(f"shuffled labels {i}", other) for i, other in enumerate(shuffled, start=1)]
    rows += [bench.row(name, _removed(bench, name, other)) for name, other in tried]
    return Study(
        name="controls",
        asks="Is it these directions, or does any edit of this size do the same?",
        rows=tuple(rows),
    )


def _random_like(basis: Tensor, draw: int) -> Tensor:
    """Random directions of the same shape; a block's own where each block has its own."""
    d_model, k = basis.shape[-2:]
    if basis.ndim == 2:
        return random_basis(d_model, k, seed=draw)
    seeds = range(draw * len(basis), (draw + 1) * len(basis))
    return torch.stack([random_basis(d_model, k, seed=seed) for seed in seeds])


def confirmation_edits(n_given: int) -> int:
    """How many edits `study_confirmation` measures for so many layers."""
    return min(SINGLE, n_given) + sum(k <= n_given for k in STACKS) + 1


def _removed(bench: Bench, name: str, basis: Tensor) -> Measured:
    subject = bench.subject
    return bench.measure(name, preview_edit(subject.loaded, subject.plan, basis))
