"""What is removed from an estimated direction: the neutral mean, and directions of other sets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from abliterator.directions._fit import without_mean
from abliterator.directions._observations import Observations


@dataclass(frozen=True)
class Cleaning:
    """What is removed from every direction after its estimation.

    Attributes:
        projection: whether the component along the neutral mean is removed.
        ridge: strength of the penalty with which the directions of the protected sets are removed,
            in units of their squared length; 0 removes them to rounding.
    """

    projection: bool = False
    ridge: float = 0.01


def cleaned(
    vectors: Tensor, observations: Observations, cleaning: Cleaning, *, layer: int | None = None
) -> Tensor:
    """Directions without the neutral mean, then without the protected sets, where that is asked.

    Args:
        vectors: [L, H] float64, one direction a layer; [n, H] of one layer where `layer` is given.
        observations: with the means of the neutral and of the protected prompts.
        cleaning: what is removed.
        layer: the residual layer, 1 .. L, of all vectors.

    Returns:
        The same shape.
    """
    rows = slice(None) if layer is None else slice(layer - 1, layer)
    if cleaning.projection:
        vectors = without_mean(vectors, observations.ordinary.mean[rows])
    if observations.protected:
        vectors = residualized(vectors, protected_directions(observations)[rows], cleaning.ridge)
    return vectors


def protected_directions(observations: Observations) -> Tensor:
    """Unit directions [L, S, H] of the S protected sets, in the order of their names.

    a = mean(set) - mean(neutral): what tells the set's prompts from ordinary ones. The neutral mean
    is subtracted, not the contrast's, since a contrast is as like the target as can be: the topics
    of the target would be in every a, and what is common to all prompts would be in their means.
    """
    baseline = observations.ordinary.mean
    sets = sorted(observations.protected.items())
    differences = torch.stack([moments.mean - baseline for _, moments in sets], dim=1)
    return torch.nn.functional.normalize(differences, dim=2)


def residualized(vectors: Tensor, protected: Tensor, ridge: float) -> Tensor:
    """What a ridge regression of each vector on the protected directions does not explain.

    r - Aᵀ (A Aᵀ + ridge I)⁻¹ A r with the rows of A the unit directions of the sets ("Surgical
    Refusal Ablation", arXiv 2601.08489). Of a component along one set alone ridge / (1 + ridge) is
    left; without ridge the result is orthogonal to all sets.

    Args:
        vectors: r [L, H] float64.
        protected: A [L, S, H] of unit rows, or [1, S, H] for all vectors.
        ridge: the penalty, at least 0.
    """
    gram = protected @ protected.mT
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype)
    # without a ridge the sets may be dependent: then the span of them all is removed
    inverse = torch.linalg.pinv(gram + ridge * identity, hermitian=True)
    along = (protected @ vectors.unsqueeze(-1)).squeeze(-1)
    weights = (inverse @ along.unsqueeze(-1)).squeeze(-1)
    residual: Tensor = vectors - (weights.unsqueeze(1) @ protected).squeeze(1)
    return residual
