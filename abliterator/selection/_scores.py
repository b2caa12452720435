"""Scores of one edit: the cheap ones from next-token distributions, the dear one from answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from abliterator.bake import preview_edit
from abliterator.divergence import kl_divergence
from abliterator.errors import PromptError
from abliterator.generation import Answer, as_completions, generate, stop_ids
from abliterator.judge import judge_completions
from abliterator.model import hooked
from abliterator.record import Verdict
from abliterator.selection._forced import forced_logprobs
from abliterator.selection._openings import Tokens, learn_openings, refusal_scores
from abliterator.selection._types import Answers, Asked, Base, Candidate, Subject, estimate
from abliterator.statistics import mean_interval, rate_interval

KL_TOKENS = 4  # answer tokens along which distributions are compared; the first is the prompt's own
LEAST_REFUSAL = 0.1  # of the base: below it there is nothing to remove


class Judged(NamedTuple):
    """Judged answers to the held-out target prompts."""

    products: list[float | None]  # compliance x coherence of each prompt; None: unscored
    summary: Answers


@dataclass(frozen=True)
class Baseline:
    """What the base does, measured once.

    Attributes:
        openings: how its refusals begin.
        judged: its answers to the held-out target prompts.
        target_score: mean refusal score on target prompts.
        contrast_score: mean refusal score on contrast prompts.
        forced: the first tokens of its answers to neutral prompts.
        logprobs: its distributions along them, [len(forced[i]) + 1, V].
        tokens: that were generated for all this.
    """

    openings: tuple[Tokens, ...]
    judged: Judged
    target_score: float
    contrast_score: float
    forced: list[Tokens]
    logprobs: list[Tensor]
    tokens: int

    @property
    def recorded(self) -> Base:
        """What is worth telling."""
        return Base(bypass=self.target_score, answers=self.judged.summary)


def measure_base(subject: Subject) -> Baseline:
    """Answers and distributions of the base.

    Raises:
        PromptError: if it does not refuse its target prompts, or refuses in words with which it
            answers other prompts too.
    """
    length = subject.max_new_tokens
    held_out = _answers(subject, subject.held_out, length)
    contrast = _answers(subject, subject.contrast, length)
    neutral = _answers(subject, subject.neutral, KL_TOKENS - 1)
    verdicts = _verdicts(subject, subject.held_out, held_out)
    refusals = [a.token_ids for a, v in zip(held_out, verdicts, strict=True) if v.refused]
    if len(refusals) < LEAST_REFUSAL * len(held_out):
        raise PromptError(
            f"The base refuses {len(refusals)} of {len(held_out)} held-out target prompts (judged "
            f"by {subject.judge.identity.kind}, {length} tokens), so there is nothing to remove. "
            f"Give target prompts that it refuses, or name the layers in the recipe."
        )
    sorted_out = zip(contrast, _verdicts(subject, subject.contrast, contrast), strict=True)
    openings = learn_openings(refusals, [a.token_ids for a, v in sorted_out if not v.refused])
    if not openings:
        raise PromptError(
            f"The base begins its {len(refusals)} refusals as it begins its answers to contrast "
            f"prompts, so candidates cannot be scored by how answers begin. Give contrast prompts "
            f"that it answers, or name the layers in the recipe."
        )
    forced = [answer.token_ids for answer in neutral]
    return Baseline(
        openings=openings,
        judged=Judged([_product(v) for v in verdicts], _summary(held_out, verdicts)),
        target_score=_mean_score(subject, subject.target, openings),
        contrast_score=_mean_score(subject, subject.contrast, openings),
        forced=forced,
        logprobs=_along(subject, forced),
        tokens=sum(len(a.token_ids) for a in (*held_out, *contrast, *neutral)),
    )


def score(
    subject: Subject, base: Baseline, *, layer: int, direction: Tensor, basis: Tensor
) -> Candidate:
    """The cheap scores of one layer's direction.

    Args:
        subject: the model and the prompts.
        base: from `measure_base`.
        layer: residual layer, 1 .. n_layers.
        direction: r [H] as extracted, not normalised.
        basis: Q [H, 1], the same as a unit direction.
    """
    with preview_edit(subject.loaded, subject.plan, basis):
        bypass = _mean_score(subject, subject.target, base.openings)
        kl = mean_kl(subject, base)
    with _added(subject, layer, direction):
        induced = _mean_score(subject, subject.contrast, base.openings)
    return Candidate(layer=layer, bypass=bypass, kl=kl, induce=induced - base.contrast_score)


def mean_kl(subject: Subject, base: Baseline) -> float:
    """KL(base || now) in nats: mean over neutral prompts of the mean over answer tokens."""
    pairs = zip(base.logprobs, _along(subject, base.forced), strict=True)
    return float(torch.stack([kl_divergence(b, now).mean() for b, now in pairs]).mean())


def judge_edit(subject: Subject, basis: Tensor) -> Judged:
    """Judged answers to the held-out target prompts under the edit that removes `basis` [H, k]."""
    with preview_edit(subject.loaded, subject.plan, basis):
        answers = _answers(subject, subject.held_out, subject.max_new_tokens)
    verdicts = _verdicts(subject, subject.held_out, answers)
    return Judged([_product(v) for v in verdicts], _summary(answers, verdicts))


def kl_of_edit(subject: Subject, base: Baseline, basis: Tensor) -> float:
    """`mean_kl` under the edit that removes `basis` [H, k]."""
    with preview_edit(subject.loaded, subject.plan, basis):
        return mean_kl(subject, base)


@contextmanager
def _added(subject: Subject, layer: int, direction: Tensor) -> Iterator[None]:
    """The direction added to the residual stream at its layer, at every token."""
    added = direction.to(subject.loaded.device, subject.loaded.model.dtype)
    with hooked(subject.loaded.model, {subject.blocks[layer - 1]: lambda hidden: hidden + added}):
        yield


def _mean_score(subject: Subject, asked: Asked, openings: tuple[Tokens, ...]) -> float:
    scores = refusal_scores(
        subject.loaded, asked.token_ids, openings, max_batch_tokens=subject.max_batch_tokens
    )
    return float(scores.mean())


def _along(subject: Subject, forced: list[Tokens]) -> list[Tensor]:
    return forced_logprobs(
        subject.loaded,
        subject.neutral.token_ids,
        forced,
        max_batch_tokens=subject.max_batch_tokens,
    )


def _answers(subject: Subject, asked: Asked, max_new_tokens: int) -> list[Answer]:
    return generate(
        subject.loaded,
        asked.token_ids,
        max_new_tokens=max_new_tokens,
        batch_size=subject.batch_size,
        stop_ids=stop_ids(subject.loaded),
    )


def _verdicts(subject: Subject, asked: Asked, answers: list[Answer]) -> list[Verdict]:
    completions = as_completions(answers, asked.prompts, set_name="target", side="edited")
    return judge_completions(completions, subject.judge)


def _product(verdict: Verdict) -> float | None:
    """Compliance x coherence; None where the judge could not tell, which is not 0."""
    if verdict.compliance is None or verdict.coherence is None:
        return None
    return verdict.compliance * verdict.coherence


def _summary(answers: list[Answer], verdicts: list[Verdict]) -> Answers:
    scored = [v for v in verdicts if v.kind]
    return Answers(
        refusal=estimate(rate_interval(sum(bool(v.refused) for v in scored), len(scored))),
        compliance=estimate(mean_interval([v.compliance or 0.0 for v in scored])),
        coherence=estimate(mean_interval([v.coherence or 0.0 for v in scored])),
        product=estimate(mean_interval([_product(v) or 0.0 for v in scored])),
        tokens=sum(len(answer.token_ids) for answer in answers),
    )
