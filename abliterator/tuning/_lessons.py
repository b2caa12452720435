"""Answers that the start edit gives and a judge accepts, against refusals and dodges."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from abliterator.bake import preview_edit
from abliterator.errors import DirectionError
from abliterator.generation import Answer, as_completions, generate, stop_ids
from abliterator.judge import judge_completions
from abliterator.tuning._types import Asked, Lesson, Lessons, Row, Setting, Subject

if TYPE_CHECKING:
    from torch import Tensor

    from abliterator.record import Verdict

LEAST_LESSONS = 8  # below it, a handful of answers would be learned by heart
KEPT_DODGES = 2  # beside the refusal: what was unlearned long ago needs no step any more


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
    accepted = [_accepted(v) for v in verdicts_of(subject, subject.target, answers)]
    target = tuple(
        Lesson(i, tuple(prompt), answers[i].token_ids[:tokens], refusals[i].token_ids[:tokens])
        for i, prompt in enumerate(subject.target.token_ids)
        if refused[i] and accepted[i]
    )
    if len(target) < LEAST_LESSONS:
        raise DirectionError(
            f"Tuning has {len(target)} of {len(refusals)} target prompts to learn from, expected "
            f"{LEAST_LESSONS} or more: the base refuses {sum(refused)}, and with the start edit "
            f"{sum(accepted)} are answered in full ({subject.judge.identity.kind} judge). Start "
            "from other layers, or give more target prompts."
        )
    return Lessons(target, neutral_rows(subject, subject.neutral, tokens), len(refusals))


def with_dodges(
    subject: Subject, lessons: Lessons, setting: Setting, *, tokens: int
) -> tuple[Lessons, int]:
    """Asks an edit under way its own lessons, and sets what is no answer against the answer.

    An edit that learned to avoid the base's refusals finds the nearest thing that is none: "I'm so
    glad you're interested in...". What a judge does not accept counts as a refusal from here on.

    Returns:
        The lessons, and how many got a dodge.
    """
    asked = Asked(
        [subject.target.prompts[lesson.place] for lesson in lessons.target],
        [lesson.prompt for lesson in lessons.target],
    )
    with preview_edit(subject.loaded, subject.plan, setting.basis, setting.strengths):
        answers = answers_of(subject, asked, subject.max_new_tokens)
    target, dodged = [], 0
    for lesson, answer, verdict in zip(
        lessons.target, answers, verdicts_of(subject, asked, answers), strict=True
    ):
        # an unscored answer (no kind) teaches nothing
        dodge = bool(verdict.kind and answer.token_ids and not _accepted(verdict))
        new = (answer.token_ids[:tokens], *lesson.dodges)[:KEPT_DODGES]
        target.append(lesson._replace(dodges=new) if dodge else lesson)
        dodged += dodge
    return replace(lessons, target=tuple(target)), dodged


def _accepted(verdict: Verdict) -> bool:
    return verdict.compliance == 1 and verdict.coherence == 1


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
