"""Preference pairs: answers of the start edit that a judge accepts, against refusals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from abliterator.engines import Answer, Tokens
from abliterator.errors import DirectionError
from abliterator.evaluation import (
    RenderedPrompts,
    answer_and_judge,
    behind_thinking,
    judge_answers,
)
from abliterator.tuning._types import PreferencePair, PreferencePairs, Row, TunedEdit, TuningContext

if TYPE_CHECKING:
    from torch import Tensor

    from abliterator.record import Verdict

LEAST_PAIRS = 8  # fewer answers would be memorised
KEPT_REJECTED = 2  # beside the refusal; older ones are dropped


class BaseAnswers(NamedTuple):
    """What the base answers to the prompts that are learned from.

    Attributes:
        context: the context, with the base's thinking behind each prompt if it thinks: what is
            learned is how an answer begins, which is not how a thought begins.
        target: answers to target prompts, twice as long as what is learned from.
        neutral: answers to neutral prompts.
    """

    context: TuningContext
    target: Sequence[Answer]
    neutral: Sequence[Answer]


def base_answers(context: TuningContext) -> BaseAnswers:
    """Answers of the base to target and neutral prompts, behind its thinking."""
    answers = _answered(context)
    if not any(answer.start_token for answer in (*answers.target, *answers.neutral)):
        return answers
    evaluation = context.evaluation
    target, neutral = (behind_thinking(evaluation, p) for p in (context.target, context.neutral))
    return _answered(replace(context, target=target, neutral=neutral))


def _answered(context: TuningContext) -> BaseAnswers:
    evaluation, tokens = context.evaluation, context.config.tokens
    # a refusal that begins later than twice the tokens is not in those that are learned from
    target, neutral = (
        evaluation.engine.answers(
            prompts.token_ids,
            max_new_tokens=max_new_tokens,
            batch_size=evaluation.batch_size,
            share_prefix=True,
        )
        for prompts, max_new_tokens in ((context.target, 2 * tokens), (context.neutral, tokens))
    )
    return BaseAnswers(context, target, neutral)


def make_pairs(base: BaseAnswers, basis: Tensor) -> PreferencePairs:
    """Answers of the base and of the start edit to the same target prompts, as preference pairs.

    A pair is a prompt that the base refuses and that the start edit answers, by the judge's verdict
    fully and coherently. So the target of the descent is an answer, not the absence of a word.

    Args:
        base: from `base_answers`, with the model, the prompts and the judge.
        basis: Q [H, k] of the start, removed at the plan's strengths.

    Raises:
        DirectionError: if too few prompts give a pair.
    """
    context = base.context
    tokens, evaluation = context.config.tokens, context.evaluation
    verdicts = judge_answers(evaluation, context.target, base.target).verdicts
    with evaluation.engine.edited(evaluation.writer_edit(basis)):
        start = answer_and_judge(evaluation, context.target)
    refused = [bool(verdict.refused) for verdict in verdicts]
    accepted = [_accepted(verdict) for verdict in start.verdicts]
    target = tuple(
        PreferencePair(
            i,
            tuple(prompt),
            start.answers[i].token_ids[:tokens],
            base.target[i].token_ids[:tokens],
        )
        for i, prompt in enumerate(context.target.token_ids)
        if refused[i] and accepted[i]
    )
    if len(target) < LEAST_PAIRS:
        raise DirectionError(
            f"Tuning has {len(target)} of {len(refused)} target prompts to learn from, expected "
            f"{LEAST_PAIRS} or more: the base refuses {sum(refused)}, and with the start edit "
            f"{sum(accepted)} are answered in full ({evaluation.judge.identity.kind} judge). Start "
            "from other layers, or give more target prompts."
        )
    rows = tuple(
        Row(tuple(prompt), answer.token_ids)
        for prompt, answer in zip(context.neutral.token_ids, base.neutral, strict=True)
        if answer.token_ids
    )
    return PreferencePairs(target, rows)


def with_rejected(
    context: TuningContext, pairs: PreferencePairs, edit: TunedEdit
) -> tuple[PreferencePairs, int]:
    """The pairs with the answers of an intermediate edit that the judge rejects.

    An edit that learned to avoid the base's refusals gives answers that are near to one: "I'm so
    glad you're interested in...". What a judge does not accept counts as a refusal from here on.

    Returns:
        The pairs, and how many got a rejected response.
    """
    evaluation = context.evaluation
    prompts = RenderedPrompts(
        [context.target.prompts[pair.place] for pair in pairs.target],
        [pair.prompt for pair in pairs.target],
    )
    with evaluation.engine.edited(edit.of(context.plan)):
        judged = answer_and_judge(evaluation, prompts)
    target, n_rejected = [], 0
    for pair, answer, verdict in zip(pairs.target, judged.answers, judged.verdicts, strict=True):
        # an unscored answer (no kind) is not used
        is_rejected = bool(verdict.kind and answer.token_ids and not _accepted(verdict))
        tokens: Tokens = answer.token_ids[: context.config.tokens]
        rejected = (tokens, *pair.rejected)[:KEPT_REJECTED]
        target.append(pair._replace(rejected=rejected) if is_rejected else pair)
        n_rejected += is_rejected
    return replace(pairs, target=tuple(target)), n_rejected


def _accepted(verdict: Verdict) -> bool:
    return verdict.compliance == 1 and verdict.coherence == 1
