"""What each setting does to held-out prompts, which are on the front, and which one is taken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from abliterator.bake import preview_edit
from abliterator.divergence import kl_terms, require_finite
from abliterator.errors import DirectionError
from abliterator.record import Estimate
from abliterator.statistics import mean_interval, rate_interval
from abliterator.tuning._lessons import answers_of, neutral_rows, verdicts_of
from abliterator.tuning._rows import answer_logprobs
from abliterator.tuning._types import Point, Setting, Subject

Preference = Literal["product", "refusals_at_most", "kl_at_most"]

NO_WORSE = 0.02  # less product than the best: a prompt or two, which chance decides


class Yardstick:
    """Held-out prompts, and what the base does on them, measured once.

    Args:
        subject: the model and the prompts.
        start: Q [H, k], or [L, H, k], that the descent began with.
        tokens: of the base's answers to neutral prompts, along which divergence is measured.
    """

    def __init__(self, subject: Subject, start: Tensor, *, tokens: int) -> None:
        self._subject, self._start = subject, start
        self._rows = neutral_rows(subject, subject.held_out_neutral, tokens)
        self._base = self._logprobs()

    def measure(self, setting: Setting, *, kl_weight: float, scale: float) -> Point:
        """Judges answers to target prompts under an edit, and measures how far neutral ones move.

        Args:
            setting: the edit.
            kl_weight: with which it was found, for the point.
            scale: of its strengths, for the point.
        """
        subject = self._subject
        with preview_edit(subject.loaded, subject.plan, setting.basis, setting.strengths):
            edited = self._logprobs()
            answers = answers_of(subject, subject.held_out, subject.max_new_tokens)
        kl = [
            require_finite(kl_terms(b, e).sum(dim=1))
            for b, e in zip(self._base, edited, strict=True)
        ]
        verdicts = [v for v in verdicts_of(subject, subject.held_out, answers) if v.kind]
        products = [(v.compliance or 0.0) * (v.coherence or 0.0) for v in verdicts]
        return Point(
            kl_weight=kl_weight,
            scale=scale,
            cosine=_cosine(self._start, setting.basis),
            kl=float(torch.cat(kl).mean()),
            kl_first_token=float(torch.stack([row[0] for row in kl]).mean()),
            refusal=Estimate.of(
                rate_interval(sum(bool(v.refused) for v in verdicts), len(verdicts))
            ),
            compliance=Estimate.of(mean_interval([v.compliance or 0.0 for v in verdicts])),
            coherence=Estimate.of(mean_interval([v.coherence or 0.0 for v in verdicts])),
            product=Estimate.of(mean_interval(products)),
        )

    def _logprobs(self) -> list[Tensor]:
        size = self._subject.batch_size
        batches = [self._rows[i : i + size] for i in range(0, len(self._rows), size)]
        with torch.inference_mode():
            return [
                row for batch in batches for row in answer_logprobs(self._subject.loaded, batch)
            ]


def _cosine(start: Tensor, basis: Tensor) -> float:
    """The least singular value of Q_startᵀ Q, over all blocks where each has its own."""
    return float(torch.linalg.svdvals(start.double().mT @ basis).min())


def with_front(points: Sequence[Point]) -> list[Point]:
    """The points, each told whether no other has both as high a product and as low a KL."""
    return [
        point.model_copy(update={"on_front": not any(_beats(other, point) for other in points)})
        for point in points
    ]


def prefer(
    points: Sequence[Point],
    preference: Preference,
    at_most: float | None = None,
    *,
    max_kl: float = math.inf,
) -> int:
    """Which point is taken: its index.

    `product` takes the best mean of compliance x coherence among those with at most `max_kl` nats a
    token, `kl_at_most` the same with a limit of its own, `refusals_at_most` the least KL among
    those with at most that share of refusals. Where products are within `NO_WORSE`, the least KL
    decides. Never the loss that was descended: that is what a model learns to please.

    Raises:
        DirectionError: if no point keeps the limit; it names the nearest.
    """

    def measure(point: Point) -> float:
        refusal = point.refusal.value if point.refusal else 1.0
        return refusal if preference == "refusals_at_most" else point.kl

    limit = max_kl if at_most is None else at_most
    allowed = [i for i, point in enumerate(points) if measure(point) <= limit]
    if not allowed:
        nearest = min(map(measure, points))
        raise DirectionError(
            f"No tuned point keeps to {limit:g} (`tuning.prefer: {preference}`); the nearest has "
            f"{nearest:.3g}. Allow more (`tuning.at_most`, `selection.max_kl`), or give more "
            "`tuning.steps` or other `tuning.kl_weights`."
        )
    best = max(_product(points[i]) for i in allowed)
    if preference != "refusals_at_most":
        allowed = [i for i in allowed if _product(points[i]) >= best - NO_WORSE]
    return min(allowed, key=lambda i: points[i].kl)


def _beats(one: Point, other: Point) -> bool:
    at_least = _product(one) >= _product(other) and one.kl <= other.kl
    return at_least and (_product(one), one.kl) != (_product(other), other.kl)


def _product(point: Point) -> float:
    return point.product.value if point.product else 0.0
