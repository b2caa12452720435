"""Cosines and effective rank of the directions of several layers, and a verdict."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from abliterator.directions import AnyPlace
from abliterator.record import Stack, Structure
from abliterator.selection._pool import Pool
from abliterator.subspace import cosine_matrix

# Effective rank between 1 (all directions the same) and n (all orthogonal): nearer to 1 than to 2.
ONE_DIRECTION = 1.5


def participation_ratio(directions: Tensor) -> float:
    """Effective rank of unit directions [n, H]: (Σ λ)² / Σ λ², λ the eigenvalues of the cosines."""
    eigenvalues = torch.linalg.eigvalsh(cosine_matrix(directions)).clamp_min(0)
    return float(eigenvalues.sum() ** 2 / eigenvalues.square().sum())


def describe(pool: Pool, *, best: Sequence[AnyPlace], stacks: Sequence[Stack], k: int) -> Structure:
    """The cosine matrix of the candidates' layers, the effective rank of the `best`, and a verdict.

    The cosines are of the position of the best. Where stacks were judged, they decide the verdict:
    directions that differ may still do the same work, and directions that agree may leave some
    undone.
    """
    ratio = participation_ratio(torch.stack([pool.direction(place) for place in best]))
    single = k == 1 if stacks else ratio < ONE_DIRECTION
    position = best[0].position
    layers = sorted({place.layer for place in pool.places})
    cosines = cosine_matrix(pool.directions[position].vectors[[layer - 1 for layer in layers]])
    figures = [f"participation ratio {ratio:.2f} over layers {', '.join(map(str, best))}"]
    for stack in stacks:
        if stack.answers.product is not None:
            figures.append(f"product {stack.answers.product.value:.3f} at k = {stack.k}")
    return Structure(
        layers=tuple(layers),
        position=position,
        cosines=tuple(tuple(round(c, 6) for c in row) for row in cosines.tolist()),
        participation_ratio=ratio,
        verdict="single direction" if single else "low-rank subspace",
        because=", ".join(figures),
    )
