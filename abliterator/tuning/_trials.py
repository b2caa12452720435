"""Trials: tuned edits measured on held-out prompts, their Pareto front, and the preferred one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from abliterator.errors import DirectionError
from abliterator.evaluation import PathDivergence
from abliterator.record import AnswerSummary, Trial
from abliterator.subspace import is_by_writer, pair_cosines

Preference = Literal["product", "refusals_at_most", "kl_at_most"]

NO_WORSE = 0.02  # less product than the best: one or two prompts, which is noise


def mean_divergence(paths: Sequence[PathDivergence]) -> tuple[float, float]:
    """KL in nats: the mean over all positions of all paths, and that over their first."""
    kl = [path.kl for path in paths]
    return float(torch.cat(kl).mean()), float(torch.stack([path[0] for path in kl]).mean())


def trial_of(
    answers: AnswerSummary,
    divergence: tuple[float, float],
    start: Tensor,
    basis: Tensor,
    *,
    kl_weight: float,
    scale: float,
) -> Trial:
    """A measured edit as a trial.

    Args:
        answers: to held-out target prompts.
        divergence: from `mean_divergence`, on held-out neutral prompts.
        start: Q [H, k], or [L, H, k], or pairs, that the descent began with.
        basis: of the edit.
        kl_weight: with which it was tuned.
        scale: of its strengths.
    """
    kl, kl_first_token = divergence
    return Trial(
        kl_weight=kl_weight,
        scale=scale,
        cosine=_cosine(start, basis),
        kl=kl,
        kl_first_token=kl_first_token,
        **answers.model_dump(exclude={"tokens"}),
    )


def _cosine(start: Tensor, basis: Tensor) -> float:
    """The least singular value of Q_startᵀ Q, over all blocks where each has its own.

    Of pairs, the least cosine between a module's U Vᵀ and that of its start.
    """
    if is_by_writer(basis):
        return float(pair_cosines(basis, start.double()).min())
    return float(torch.linalg.svdvals(start.double().mT @ basis).min())


def with_front(trials: Sequence[Trial]) -> list[Trial]:
    """The trials with `on_front` set where no other has both as high a product and as low a KL."""
    return [
        trial.model_copy(update={"on_front": not any(_beats(other, trial) for other in trials)})
        for trial in trials
    ]


def prefer(
    trials: Sequence[Trial],
    preference: Preference,
    at_most: float | None = None,
    *,
    max_kl: float = math.inf,
) -> int:
    """The index of the preferred trial.

    `product` prefers the best mean of compliance x coherence among those with at most `max_kl` nats
    a token, `kl_at_most` the same with a limit of its own, `refusals_at_most` the least KL among
    those with at most that share of refusals. Where products are within `NO_WORSE`, the least KL
    decides. Of trials within the limit, those that dropped out before they answered all prompts
    are left out. Never the loss that was descended, which the tuned model has been fitted to.

    Raises:
        DirectionError: if no trial keeps the limit; it names the nearest.
    """

    def measure(trial: Trial) -> float:
        refusal = trial.refusal.value if trial.refusal else 1.0
        return refusal if preference == "refusals_at_most" else trial.kl

    limit = max_kl if at_most is None else at_most
    allowed = [i for i, trial in enumerate(trials) if measure(trial) <= limit]
    if not allowed:
        nearest = min(map(measure, trials))
        raise DirectionError(
            f"No tuned trial keeps to {limit:g} (`tuning.prefer: {preference}`); the nearest has "
            f"{nearest:.3g}. Allow more (`tuning.at_most`, `selection.max_kl`), or give more "
            "`tuning.steps` or other `tuning.kl_weights`."
        )
    answered = max(_prompts(trials[i]) for i in allowed)
    allowed = [i for i in allowed if _prompts(trials[i]) == answered]
    best = max(_product(trials[i]) for i in allowed)
    if preference != "refusals_at_most":
        allowed = [i for i in allowed if _product(trials[i]) >= best - NO_WORSE]
    return min(allowed, key=lambda i: trials[i].kl)


def _beats(trial: Trial, other: Trial) -> bool:
    at_least = _product(trial) >= _product(other) and trial.kl <= other.kl
    return at_least and (_product(trial), trial.kl) != (_product(other), other.kl)


def _prompts(trial: Trial) -> int:
    """Prompts that it was asked; 0 in records of before they were counted."""
    return (trial.product and trial.product.asked) or 0


def _product(trial: Trial) -> float:
    return trial.product.value if trial.product else 0.0
