"""Figures of directions: what is left of protected sets in them, and how two estimates agree."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from abliterator.directions._estimators import ESTIMATORS, Cleaning, cleaned
from abliterator.directions._estimators._cleaning import protected_directions
from abliterator.directions._fit import Directions
from abliterator.directions._observations import Observations


class ProtectedShare(NamedTuple):
    """|cos| between the estimate and a protected set's direction at every layer, [L] each.

    Attributes:
        before: of the estimate as it is.
        protected: where all sets are protected.
        left_out: where all sets but this one are: what protection does for a set that nobody named.
    """

    before: Tensor
    protected: Tensor
    left_out: Tensor


def leave_one_set_out(
    name: str, observations: Observations, cleaning: Cleaning
) -> dict[str, ProtectedShare]:
    """How much of each protected set's direction is left in the estimate, by set.

    Args:
        name: of the estimator.
        observations: with protected sets.
        cleaning: what is removed.
    """
    raw = ESTIMATORS[name].function(observations)
    directions = protected_directions(observations)

    def share(index: int, without: tuple[str, ...]) -> Tensor:
        kept = {s: m for s, m in observations.protected.items() if s not in without}
        estimate = cleaned(raw, replace(observations, protected=kept), cleaning)
        return torch.cosine_similarity(estimate, directions[:, index], dim=1).abs()

    names = sorted(observations.protected)
    return {
        s: ProtectedShare(share(i, tuple(names)), share(i, ()), share(i, (s,)))
        for i, s in enumerate(names)
    }


def cosines_between(one: Directions, other: Directions) -> Tensor:
    """The cosine at every layer, [L] float64; 0 where one has no length.

    Of the direction at the last token of the user's text (`instruction`) and that at the last token
    of the template it tells harmfulness from refusal (Zhao et al. 2025, arXiv 2507.11878).
    """
    return torch.cosine_similarity(one.vectors.double(), other.vectors.double(), dim=1)
