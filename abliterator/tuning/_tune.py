"""Tunes a start edit, and measures the tuned edits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from abliterator.evaluation import EditEvaluator, OnStep, RenderedPrompts, behind_thinking
from abliterator.files import Journal
from abliterator.prompts import readable
from abliterator.record import Trial
from abliterator.tuning._descend import descend
from abliterator.tuning._kept import KeptSteps, dump_pairs, load_pairs
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
    journal: Journal | None = None,
    on_step: OnStep = lambda name: None,
) -> Tuned:
    """Tunes an edit from `basis`, and measures the results.

    Args:
        context: the model, which writers are edited, the prompts and the config.
        basis: Q [H, k] float64 of the start, orthonormal columns.
        scratch: a file for the base's logits on held-out neutral prompts; it is deleted.
        journal: of an interrupted tuning with the same arguments: its finished steps are not done
            again, and those of this one are added. Of trials, the base is measured again.
        on_step: called with each step that is done.

    Raises:
        DirectionError: if there is too little to learn from, or the descent diverges.
    """
    kept = KeptSteps(journal)
    prompts = kept.value("prompts", partial(_dump_prompts, context))
    target, neutral = (RenderedPrompts(texts, token_ids) for texts, token_ids in prompts)
    context = replace(context, target=target, neutral=neutral)

    def first_pairs() -> Any:
        pairs = make_pairs(context, basis)
        on_step(f"{len(pairs.target)} preference pairs")
        return dump_pairs(pairs)

    def ask_again(pairs: PreferencePairs, edit: TunedEdit) -> PreferencePairs:
        new_pairs, n_rejected = with_rejected(context, pairs, edit)
        on_step(f"{n_rejected} rejected responses")
        return new_pairs

    pairs = load_pairs(kept.value("pairs", first_pairs))
    results = descend(context, pairs, basis, on_step=on_step, ask_again=ask_again, kept=kept)
    start = TunedEdit(basis, {e.writer.module: e.strength for e in context.plan.edits})
    candidates = [(0.0, 1.0, start)]
    candidates += [
        (weight, scale, result.scaled(scale))
        for weight, result in zip(context.config.kl_weights, results, strict=True)
        for scale in context.config.scales
    ]
    trials = _measured(context, candidates, scratch=scratch, kept=kept, on_step=on_step)
    return Tuned([edit for *_, edit in candidates], with_front(trials), len(pairs.target))


def _measured(
    context: TuningContext,
    candidates: Sequence[tuple[float, float, TunedEdit]],
    *,
    scratch: Path,
    kept: KeptSteps,
    on_step: OnStep,
) -> list[Trial]:
    """Each candidate (KL weight, scale, edit) on held-out prompts; the first is the start edit."""
    *_, start = candidates[0]
    with ExitStack() as stack:
        evaluator = cache(
            lambda: stack.enter_context(EditEvaluator(context.evaluation, scratch))
        )  # where a trial is left

        def measured(weight: float, scale: float, edit: TunedEdit) -> Any:
            name = f"weight {weight:g} x {scale:g}"
            figures = evaluator().measure(name, edit.of(context.plan))
            on_step(f"{name} judged")
            trial = trial_of(figures, start.basis, edit.basis, kl_weight=weight, scale=scale)
            return trial.model_dump(mode="json")

        trials = [kept.value("trial", partial(measured, *candidate)) for candidate in candidates]
        return [Trial.model_validate(trial) for trial in trials]


def _dump_prompts(context: TuningContext) -> list[Any]:
    """The prompts that are learned from, behind the base's thinking, as a JSON value."""
    context = _behind_thinking(context)
    return [
        [[*map(readable, rendered.prompts)], [list(ids) for ids in rendered.token_ids]]
        for rendered in (context.target, context.neutral)
    ]


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
