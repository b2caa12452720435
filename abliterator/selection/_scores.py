"""Scores of many edits at once: cheap ones from distributions, the dear one from answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abliterator.divergence import kl_divergence, require_finite
from abliterator.errors import PromptError
from abliterator.generation import Answer, as_completions
from abliterator.judge import judge_completions
from abliterator.record import Estimate, Verdict
from abliterator.selection._openings import Tokens, learn_openings
from abliterator.selection._pool import Pool
from abliterator.selection._rows import Edited, added, removed, unedited
from abliterator.selection._types import Answers, Base, Candidate, Subject
from abliterator.statistics import mean_interval, rate_interval

KL_TOKENS = 4  # answer tokens along which distributions are compared; the first is the prompt's own
LEAST_REFUSAL = 0.1  # of the base: below it there is nothing to remove


@dataclass(frozen=True)
class Judged:
    """Judged answers to some of the held-out target prompts, in one order."""

    answers: tuple[Answer, ...]
    verdicts: tuple[Verdict, ...]

    def __add__(self, more: Judged) -> Judged:
        return Judged(self.answers + more.answers, self.verdicts + more.verdicts)

    @property
    def products(self) -> list[float | None]:
        """Compliance x coherence of each."""
        return list(map(product, self.verdicts))

    @property
    def tokens(self) -> int:
        """Generated, all answers together."""
        return sum(len(answer.token_ids) for answer in self.answers)

    @property
    def summary(self) -> Answers:
        """All of them in figures."""
        scored = [v for v in self.verdicts if v.kind]
        return Answers(
            refusal=Estimate.of(rate_interval(sum(bool(v.refused) for v in scored), len(scored))),
            compliance=Estimate.of(mean_interval([v.compliance or 0.0 for v in scored])),
            coherence=Estimate.of(mean_interval([v.coherence or 0.0 for v in scored])),
            product=Estimate.of(mean_interval([p for p in self.products if p is not None])),
            tokens=self.tokens,
        )


def product(verdict: Verdict) -> float | None:
    """Compliance x coherence of an answer; None where the judge could not tell, which is not 0."""
    if verdict.compliance is None or verdict.coherence is None:
        return None
    return verdict.compliance * verdict.coherence


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
    base, length = unedited(subject), subject.max_new_tokens
    (held_out,) = judge_edited(base, range(len(subject.held_out.prompts)))
    (contrast,) = base.answers(subject.contrast.token_ids, length)
    (neutral,) = base.answers(subject.neutral.token_ids, KL_TOKENS - 1)
    refusals = [
        a.token_ids for a, v in zip(held_out.answers, held_out.verdicts, strict=True) if v.refused
    ]
    if len(refusals) < LEAST_REFUSAL * len(held_out.answers):
        raise PromptError(
            f"The base refuses {len(refusals)} of {len(held_out.answers)} held-out target prompts "
            f"(judged by {subject.judge.identity.kind}, {length} tokens), so there is nothing to "
            f"remove. Give target prompts that it refuses, or name the layers in the recipe."
            f"{thinking_note([*held_out.answers, *contrast])}"
        )
    judged = _verdicts(subject, subject.contrast.prompts, contrast)
    sorted_out = zip(contrast, judged, strict=True)
    openings = learn_openings(refusals, [a.token_ids for a, v in sorted_out if not v.refused])
    if not openings:
        raise PromptError(
            f"The base begins its {len(refusals)} refusals as it begins its answers to contrast "
            f"prompts, so candidates cannot be scored by how answers begin. Give contrast prompts "
            f"that it answers, or name the layers in the recipe."
            f"{thinking_note([*held_out.answers, *contrast])}"
        )
    forced = [answer.token_ids for answer in neutral]
    along = {prompt: logprobs for _, prompt, logprobs in base.along(forced)}
    return Baseline(
        openings=openings,
        judged=held_out,
        target_score=base.refusal(subject.target, openings)[0],
        contrast_score=base.refusal(subject.contrast, openings)[0],
        forced=forced,
        logprobs=[along[prompt] for prompt in range(len(forced))],
        tokens=sum(len(a.token_ids) for a in (*held_out.answers, *contrast, *neutral)),
    )


def thinking_note(answers: Sequence[Answer]) -> str:
    """What to do about thinking where there is any; "" otherwise.

    Candidates are scored by the first tokens after the prompt, which then are those of thinking.
    """
    thought = sum(answer.start > 0 for answer in answers)
    if not thought:
        return ""
    return (
        f" {thought} of its {len(answers)} replies begin with thinking, and so their first tokens "
        "say little of the answer: switch thinking off in `chat.template_kwargs` (often "
        "`enable_thinking: false`), or raise `selection.tokens`."
    )


def score(subject: Subject, base: Baseline, pool: Pool) -> list[Candidate]:
    """The cheap scores of every place of `pool`, in their order.

    Raises:
        DirectionError: for a direction of no length.
    """
    bases = [pool.stack([place], 1).basis for place in pool.places]
    with removed(subject, bases) as edited:
        bypass = edited.refusal(subject.target, base.openings)
        kl = mean_kl(edited, base, prompts=len(subject.target.prompts))
    directions = [pool.direction(place) for place in pool.places]
    with added(subject, [place.layer for place in pool.places], directions) as steered:
        induced = steered.refusal(subject.contrast, base.openings)
    return [
        Candidate(
            layer=place.layer,
            position=place.position,
            bypass=bypass[i],
            kl=kl[i],
            induce=induced[i] - base.contrast_score,
        )
        for i, place in enumerate(pool.places)
    ]


def mean_kl(edited: Edited, base: Baseline, *, prompts: int | None = None) -> list[float]:
    """KL(base || now) in nats: mean over neutral prompts of the mean over answer tokens.

    Over the first `prompts` of them; over all unless given.
    """
    forced = base.forced[:prompts]
    found = torch.zeros(edited.n, len(forced), dtype=torch.float64)
    for i, prompt, logprobs in edited.along(forced):
        found[i, prompt] = require_finite(kl_divergence(base.logprobs[prompt], logprobs)).mean()
    return [float(mean) for mean in found.mean(dim=1)]


def judge_edits(
    subject: Subject, bases: Sequence[Tensor], prompts: Sequence[int] | None = None
) -> list[Judged]:
    """Judged answers to held-out target prompts under edits that remove each of `bases` [H, k].

    Args:
        subject: the model and the prompts.
        bases: Q of each edit.
        prompts: indices of the held-out prompts; all unless given.
    """
    asked = range(len(subject.held_out.prompts)) if prompts is None else prompts
    with removed(subject, bases) as edited:
        return judge_edited(edited, asked)


def judge_edited(edited: Edited, prompts: Sequence[int]) -> list[Judged]:
    """Judged answers to these of the held-out target prompts, for each intervention."""
    subject = edited.subject
    token_ids = [subject.held_out.token_ids[i] for i in prompts]
    asked = [subject.held_out.prompts[i] for i in prompts]
    return [
        Judged(tuple(answers), tuple(_verdicts(subject, asked, answers)))
        for answers in edited.answers(token_ids, subject.max_new_tokens)
    ]


def _verdicts(subject: Subject, prompts: Sequence[str], answers: Sequence[Answer]) -> list[Verdict]:
    completions = as_completions(answers, prompts, set_name="target", side="edited")
    return judge_completions(completions, subject.judge)
