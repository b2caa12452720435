"""Estimators of a direction per layer: pure functions of observations, by name.

An estimator maps `Observations` to one vector per residual layer, [L, H] float64. What every
estimate may go through afterwards (`Cleaning`) is not its business.

    directions = estimate("whitened", observations, Cleaning(projection=True))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from abliterator.directions._estimators._cleaning import Cleaning, cleaned
from abliterator.directions._estimators._logistic import logistic
from abliterator.directions._estimators._whitened import whitened
from abliterator.directions._fit import Directions
from abliterator.directions._observations import Observations
from abliterator.errors import DirectionError

__all__ = ["ESTIMATORS", "Cleaning", "Estimator", "cleaned", "estimate", "estimator_of"]


@dataclass(frozen=True)
class Estimator:
    """A way to estimate the behaviour's direction at every layer.

    Attributes:
        function: observations to r [L, H] float64; row l - 1 is that of residual layer l.
        paper: where it is from.
        needs_vectors: whether it reads every prompt's vector, not the moments alone.
    """

    function: Callable[[Observations], Tensor]
    paper: str
    needs_vectors: bool = False


def mean_difference(observations: Observations) -> Tensor:
    """R = mean(target) - mean(contrast) at every layer, [L, H] (Arditi et al. 2024, eq. 2)."""
    return observations.target.mean - observations.contrast.mean


ESTIMATORS: Mapping[str, Estimator] = {
    "mean_difference": Estimator(mean_difference, "Arditi et al. 2024, arXiv 2406.11717"),
    "whitened": Estimator(
        whitened, "Fisher 1936; Ledoit and Wolf 2004 (shrinkage)", needs_vectors=True
    ),
    "logistic": Estimator(
        logistic, "Alain and Bengio 2016, arXiv 1610.01644 (linear probes)", needs_vectors=True
    ),
}


def estimator_of(name: str) -> Estimator:
    """One of `ESTIMATORS`.

    Raises:
        DirectionError: for a name that none of them has.
    """
    if name not in ESTIMATORS:
        raise DirectionError(
            f"There is no estimator {name}; those there are: {', '.join(ESTIMATORS)}."
        )
    return ESTIMATORS[name]


def estimate(name: str, observations: Observations, cleaning: Cleaning | None = None) -> Directions:
    """The direction of every layer by one of `ESTIMATORS`.

    Args:
        name: of the estimator.
        observations: of one token position.
        cleaning: what is removed from the estimate; nothing unless given.

    Raises:
        DirectionError: for an unknown name, and where no direction can be estimated at a layer.
    """
    vectors = estimator_of(name).function(observations)
    return Directions(cleaned(vectors, observations, cleaning or Cleaning()))
