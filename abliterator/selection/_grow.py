"""The number of directions: a stack grows while its judged answers improve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from abliterator import recipe
from abliterator.directions import AnyPlace, nodes_of
from abliterator.evaluation import EvaluationContext, JudgedAnswers, summarise_draws
from abliterator.record import AnswerSummary, Estimate, Stack
from abliterator.selection._pool import Pool
from abliterator.selection._scores import Baseline, judge_edits, mean_kl
from abliterator.selection._step import OnStep, Step
from abliterator.statistics import paired_delta
from abliterator.subspace import random_basis


@dataclass(frozen=True)
class Control:
    """The same edit along directions that are independent of the behaviour, drawn several times.

    One draw is noisy. Where the base nearly refuses or nearly answers, a random direction changes
    some answers, and two draws differ by as much as a stack gains. So a prompt counts as the mean
    of its products under several draws.

    Attributes:
        draws: judged answers under each.
        kl: nats on neutral answers, mean over the draws.
    """

    draws: tuple[JudgedAnswers, ...]
    kl: float

    @property
    def products(self) -> list[float | None]:
        """Compliance x coherence of each prompt, mean over draws."""
        columns = zip(*(judged.products for judged in self.draws), strict=True)
        scored = ([value for value in column if value is not None] for column in columns)
        return [mean(prompt) if prompt else None for prompt in scored]

    @property
    def summary(self) -> AnswerSummary:
        """Estimates over all draws; intervals are over prompts, not over answers."""
        return summarise_draws(self.draws)


def grow_stack(
    context: EvaluationContext,
    base: Baseline,
    pool: Pool,
    order: Sequence[AnyPlace],
    sizes: Sequence[int],
    settings: recipe.Selection,
    *,
    on_step: OnStep,
) -> tuple[list[Stack], str]:
    """Stacks of growing `sizes`, up to the first that is no better.

    A larger stack is better if the 95 % interval of the paired difference of its products lies
    above 0 against the smaller stack, against as many random directions and against as many from
    shuffled labels (of either, the mean of several draws), and its KL passes. A control that breaks
    the model does not count: where the stream has a few huge dimensions, a random direction spreads
    them over all others, and a broken model refuses nothing.

    Returns:
        The stacks that were tried (the last may not be better), and why it stopped.
    """
    tried: list[Stack] = []
    smaller: JudgedAnswers | None = None
    most = pool.most(order)
    for k in (size for size in sizes if size <= most):
        stack, judged = _measure_stack(
            context, base, pool, order, k, smaller=smaller, settings=settings
        )
        tried.append(stack)
        answers = len(context.target.prompts) * (1 + 2 * settings.controls)
        on_step(Step(f"stack of {k} judged", answers))
        if reason := _reason_not_better(stack, settings):
            return tried, reason + _broken_controls_note(tried, settings)
        smaller = judged
    why = f"there is no larger stack to try with {most} {pool.unit}"
    return tried, why + _broken_controls_note(tried, settings)


def _measure_stack(
    context: EvaluationContext,
    base: Baseline,
    pool: Pool,
    order: Sequence[AnyPlace],
    k: int,
    *,
    smaller: JudgedAnswers | None,
    settings: recipe.Selection,
) -> tuple[Stack, JudgedAnswers]:
    """Measures one stack and its controls, side by side."""
    seed, basis = context.seed, pool.stack(order, k).basis
    n = settings.controls
    bases = [basis, *(random_basis(len(basis), k, seed=seed + k + 1000 * i) for i in range(n))]
    bases += pool.shuffled_stacks(order, k, n)
    judged, *answers = judge_edits(context, bases)
    edits = [context.writer_edit(other) for other in bases]
    limit = context.max_batch_tokens
    with context.engine.edited_side_by_side(edits, max_batch_tokens=limit) as edited:
        kl, *control_kl = mean_kl(edited, base)
    random = Control(tuple(answers[:n]), mean(control_kl[:n]))
    shuffled = Control(tuple(answers[n:]), mean(control_kl[n:])) if control_kl[n:] else None
    places = order[:1] if pool.of_one_place else order[:k]
    stack = Stack(
        k=k,
        layers=tuple(place.layer for place in places),
        positions=tuple(place.position for place in places),
        nodes=nodes_of(places),
        kl=kl,
        answers=judged.summary,
        draws=n,
        random=random.summary,
        random_kl=random.kl,
        shuffled=shuffled.summary if shuffled else None,
        shuffled_kl=shuffled.kl if shuffled else None,
        over_random=_gain(random, judged, seed),
        over_shuffled=_gain(shuffled, judged, seed) if shuffled else None,
        over_smaller=_gain(smaller, judged, seed) if smaller else None,
    )
    return stack, judged


def largest_better(tried: Sequence[Stack], settings: recipe.Selection) -> int:
    """The k of the largest stack that beats the smaller one and the controls; at least 1."""
    return max((s.k for s in tried if not _reason_not_better(s, settings)), default=1)


def _gain(before: JudgedAnswers | Control, after: JudgedAnswers, seed: int) -> Estimate | None:
    pairs = [
        (b, a)
        for b, a in zip(before.products, after.products, strict=True)
        if b is not None and a is not None
    ]
    delta = paired_delta([b for b, _ in pairs], [a for _, a in pairs], seed=seed)
    return Estimate.of(delta, len(after.products))


def _reason_not_better(tried: Stack, settings: recipe.Selection) -> str | None:
    """The reason why a stack is not better; None if it is."""
    if tried.k > 1 and tried.kl > settings.max_kl:
        return f"{tried.k} directions move neutral answers too far (KL {tried.kl:.3g} nats)"
    for gain, than, control_kl in (
        (tried.over_smaller, "the smaller stack", None),
        (tried.over_random, "random ones", tried.random_kl),
        (tried.over_shuffled, "those of shuffled labels", tried.shuffled_kl),
    ):
        if gain is None or tried.broken(control_kl, settings.max_kl):
            continue
        # without an interval (all differences equal) the value itself decides
        if (gain.value if gain.low is None else gain.low) <= 0:
            return f"{tried.k} directions are not better than {than}: product {gain:+.3f}"
    return None


def _broken_controls_note(tried: Sequence[Stack], settings: recipe.Selection) -> str:
    """A note on the sizes at which a control did not count; empty if there are none."""
    sizes: dict[str, list[str]] = {}
    for stack in tried:
        for name, kl in (("random", stack.random_kl), ("shuffled", stack.shuffled_kl)):
            if stack.broken(kl, settings.max_kl):
                sizes.setdefault(name, []).append(str(stack.k))
    parts = [f"{name} at k = {', '.join(numbers)}" for name, numbers in sizes.items()]
    return (
        f" (controls that broke the model, and did not count: {'; '.join(parts)})" if parts else ""
    )
