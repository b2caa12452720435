"""Tunes a start edit, and measures the tuned edits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from abliterator.evaluation import EditEvaluator, OnStep, behind_thinking
from abliterator.record import Trial
from abliterator.tuning._descend import descend
from abliterator.tuning._pairs import make_pairs, with_rejected
from abliterator.tuning._trials import trial_of, with_front
from abliterator.tuning._types import PreferencePairs, TunedEdit, TuningContext


class Tuned(NamedTuple):
    """Tuned edits and their measurements on held-out prompts, in the same order.

    Attributes:
        edits: edits that can be baked.
        trials: their measurements; the first is the start edit, at the plan's strengths.
        preference_pairs: target prompts that were learned from.
    """

    edits: list[TunedEdit]
    trials: list[Trial]
    preference_pairs: int


def tune(
    context: TuningContext,
    basis: Tensor,
    *,
    scratch: Path,
    on_step: OnStep = lambda name: None,
) -> Tuned:
    """Tunes an edit from `basis`, and measures the results.

    Args:
        context: the model, which writers are edited, the prompts and the config.
        basis: Q [H, k] float64 of the start, orthonormal columns.
        scratch: a file for the base's logits on held-out neutral prompts; it is deleted.
        on_step: called with each step that is done.

    Raises:
        DirectionError: if there is too little to learn from, or the descent diverges.
    """
    context = _behind_thinking(context)
    pairs = make_pairs(context, basis)
    on_step(f"{len(pairs.target)} preference pairs")

    def ask_again(pairs: PreferencePairs, edit: TunedEdit) -> PreferencePairs:
        new_pairs, n_rejected = with_rejected(context, pairs, edit)
        on_step(f"{n_rejected} rejected responses")
        return new_pairs

    results = descend(context, pairs, basis, on_step=on_step, ask_again=ask_again)
    start = TunedEdit(basis, {e.writer.module: e.strength for e in context.plan.edits})
    candidates = [(0.0, 1.0, start)]
    candidates += [
        (weight, scale, result.scaled(scale))
        for weight, result in zip(context.config.kl_weights, results, strict=True)
        for scale in context.config.scales
    ]
    trials = []
    with EditEvaluator(context.evaluation, scratch) as evaluator:
        for weight, scale, edit in candidates:
            name = f"weight {weight:g} x {scale:g}"
            measured = evaluator.measure(name, edit.of(context.plan))
            trials.append(trial_of(measured, basis, edit.basis, kl_weight=weight, scale=scale))
            on_step(f"{name} judged")
    return Tuned([edit for *_, edit in candidates], with_front(trials), len(pairs.target))


def _behind_thinking(context: TuningContext) -> TuningContext:
    """The context with the base's thinking behind each prompt that is learned from, if it thinks.

    What is learned is how an answer begins, which is not how a thought begins.
    """
    evaluation = context.evaluation
    # all prompts, for some replies may begin without a thought; few tokens show how each begins
    answers = evaluation.engine.answers(
        [*context.target.token_ids, *context.neutral.token_ids],
        max_new_tokens=context.config.tokens,
        batch_size=evaluation.batch_size,
    )
    if not any(answer.start_token for answer in answers):
        return context
    return replace(
        context,
        target=behind_thinking(evaluation, context.target),
        neutral=behind_thinking(evaluation, context.neutral),
    )
