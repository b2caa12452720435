"""Preference pairs: answers of the start edit that a judge accepts, against refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from abliterator.engines import Tokens
from abliterator.errors import DirectionError
from abliterator.evaluation import RenderedPrompts, answer_and_judge
from abliterator.tuning._types import PreferencePair, PreferencePairs, Row, TunedEdit, TuningContext

if TYPE_CHECKING:
    from torch import Tensor

    from abliterator.record import Verdict

LEAST_PAIRS = 8  # fewer answers would be memorised
KEPT_REJECTED = 2  # beside the refusal; older ones are dropped


def make_pairs(context: TuningContext, basis: Tensor) -> PreferencePairs:
    """Answers of the base and of the start edit to the same target prompts, as preference pairs.

    A pair is a prompt that the base refuses and that the start edit answers, by the judge's verdict
    fully and coherently. So the target of the descent is an answer, not the absence of a word.

    Args:
        context: the model, the prompts and the judge.
        basis: Q [H, k] of the start, removed at the plan's strengths.

    Raises:
        DirectionError: if too few prompts give a pair.
    """
    tokens, evaluation = context.config.tokens, context.evaluation
    # a refusal that begins later than this is not in the tokens that are learned from
    base = answer_and_judge(replace(evaluation, max_new_tokens=2 * tokens), context.target)
    with evaluation.engine.edited(evaluation.writer_edit(basis)):
        start = answer_and_judge(evaluation, context.target)
    refused = [bool(verdict.refused) for verdict in base.verdicts]
    accepted = [_accepted(verdict) for verdict in start.verdicts]
    target = tuple(
        PreferencePair(
            i,
            tuple(prompt),
            start.answers[i].token_ids[:tokens],
            base.answers[i].token_ids[:tokens],
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
    neutral = evaluation.engine.answers(
        context.neutral.token_ids,
        max_new_tokens=tokens,
        batch_size=evaluation.batch_size,
        share_prefix=True,
    )
    rows = tuple(
        Row(tuple(prompt), answer.token_ids)
        for prompt, answer in zip(context.neutral.token_ids, neutral, strict=True)
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
