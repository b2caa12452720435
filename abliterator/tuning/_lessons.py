"""The base's refusals, set against answers that the start edit gives and a judge accepts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from abliterator.bake import preview_edit
from abliterator.errors import DirectionError
from abliterator.generation import Answer, as_completions, generate, stop_ids
from abliterator.judge import judge_completions
from abliterator.tuning._types import Asked, Lesson, Lessons, Row, Subject

if TYPE_CHECKING:
    from torch import Tensor

    from abliterator.record import Verdict

LEAST_LESSONS = 8  # below it, a handful of answers would be learned by heart


def make_lessons(subject: Subject, basis: Tensor, *, tokens: int) -> Lessons:
    """Asks the base and the start edit the same target prompts, and keeps what is worth learning.

    A lesson is a prompt that the base refuses and that the start edit answers, by the judge's word
    fully and coherently. So the target of the descent is an answer, not the absence of a word.

    Args:
        subject: the model, the prompts and the judge.
        basis: Q [H, k] of the start, removed at the plan's strengths.
        tokens: of an answer, from its beginning, that are learned from.

    Raises:
        DirectionError: if too few prompts give a lesson.
    """
    # a refusal that comes later than this has no part in the tokens that are learned from
    refusals = answers_of(subject, subject.target, 2 * tokens)
    refused = [bool(v.refused) for v in verdicts_of(subject, subject.target, refusals)]
    with preview_edit(subject.loaded, subject.plan, basis):
        answers = answers_of(subject, subject.target, subject.max_new_tokens)
    accepted = [
        v.compliance == 1 and v.coherence == 1
        for v in verdicts_of(subject, subject.target, answers)
    ]
    target = tuple(
        Lesson(tuple(prompt), refusal.token_ids[:tokens], answer.token_ids[:tokens])
        for prompt, refusal, answer, usable in zip(
            subject.target.token_ids,
            refusals,
            answers,
            (r and a for r, a in zip(refused, accepted, strict=True)),
            strict=True,
        )
        if usable
    )
    if len(target) < LEAST_LESSONS:
        raise DirectionError(
            f"Tuning has {len(target)} of {len(refusals)} target prompts to learn from, expected "
            f"{LEAST_LESSONS} or more: the base refuses {sum(refused)}, and with the start edit "
            f"{sum(accepted)} are answered in full ({subject.judge.identity.kind} judge). Start "
            "from other layers, or give more target prompts."
        )
    return Lessons(target, neutral_rows(subject, subject.neutral, tokens), len(refusals))


def neutral_rows(subject: Subject, asked: Asked, tokens: int) -> tuple[Row, ...]:
    """The base's own greedy answers, by which a divergence is measured."""
    answers = answers_of(subject, asked, tokens)
    return tuple(
        Row(tuple(prompt), answer.token_ids)
        for prompt, answer in zip(asked.token_ids, answers, strict=True)
        if answer.token_ids
    )


def answers_of(subject: Subject, asked: Asked, length: int) -> list[Answer]:
    """Greedy answers of the model as it is now, hooks and all."""
    return generate(
        subject.loaded,
        asked.token_ids,
        max_new_tokens=length,
        batch_size=subject.batch_size,
        stop_ids=stop_ids(subject.loaded),
        share_prefix=True,
    )


def verdicts_of(subject: Subject, asked: Asked, answers: list[Answer]) -> list[Verdict]:
    """What the judge says of them."""
    completions = as_completions(answers, asked.prompts, set_name="target", side="edited")
    return judge_completions(completions, subject.judge)
