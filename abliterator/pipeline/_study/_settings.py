"""How much a study measures, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from abliterator.record import Study

# A study, and what its tables are headed by.
Measured: TypeAlias = tuple[Study, dict[str, Any]]


@dataclass(frozen=True)
class StudySettings:
    """How much a study measures.

    Attributes:
        limit: prompts of each set; None for the recipe's `rollouts.limit`.
        tokens: of a judged answer; None for the recipe's `rollouts.max_new_tokens`.
        layers: those that `pairs` compares, None for all; those whose directions `estimators`
            removes, None for the recipe's.
        alphas: those that `alpha` tries.
        draws: of each null distribution of `controls`; none with 0.
        scales: factors on the strengths at which `estimators` removes every subspace.
    """

    limit: int | None = None
    tokens: int | None = None
    layers: tuple[int, ...] | None = None
    alphas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    draws: int = 99
    scales: tuple[float, ...] = (0.5, 1.0)
