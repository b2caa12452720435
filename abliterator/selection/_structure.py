"""How directions of several layers lie to one another, in figures and in two words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from abliterator.directions import Directions
from abliterator.selection._types import Stack, Structure
from abliterator.subspace import cosine_matrix

# Effective rank between 1 (all directions the same) and n (all orthogonal): nearer to 1 than to 2.
ONE_DIRECTION = 1.5


def participation_ratio(directions: Tensor) -> float:
    """Effective rank of unit directions [n, H]: (Σ λ)² / Σ λ², λ the eigenvalues of the cosines."""
    eigenvalues = torch.linalg.eigvalsh(cosine_matrix(directions)).clamp_min(0)
    return float(eigenvalues.sum() ** 2 / eigenvalues.square().sum())


def describe(
    directions: Directions,
    *,
    layers: Sequence[int],
    best: Sequence[int],
    stacks: Sequence[Stack],
    k: int,
) -> Structure:
    """The cosine matrix of `layers`, the effective rank of the `best`, and a verdict from both.

    Where stacks were judged, they have the last word: directions that differ may still do the same
    work, and directions that agree may leave some undone.
    """
    ratio = participation_ratio(directions.vectors[[layer - 1 for layer in best]])
    single = k == 1 if stacks else ratio < ONE_DIRECTION
    cosines = cosine_matrix(directions.vectors[[layer - 1 for layer in layers]])
    figures = [f"participation ratio {ratio:.2f} over layers {', '.join(map(str, best))}"]
    for tried in stacks:
        if tried.answers.product is not None:
            figures.append(f"product {tried.answers.product.value:.3f} at k = {tried.k}")
    return Structure(
        layers=tuple(layers),
        cosines=tuple(tuple(round(c, 6) for c in row) for row in cosines.tolist()),
        participation_ratio=ratio,
        verdict="single direction" if single else "low-rank subspace",
        because=", ".join(figures),
    )
