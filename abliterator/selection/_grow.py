"""How many directions: a stack grows while its judged answers say that it should."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from abliterator.directions import Directions, stack
from abliterator.record import Estimate
from abliterator.selection._scores import Baseline, Judged, judge_edit, kl_of_edit
from abliterator.selection._sweep import Step
from abliterator.selection._types import Gates, Stack, Subject, estimate
from abliterator.statistics import paired_delta
from abliterator.subspace import orthonormal_basis


def grow_stack(
    subject: Subject,
    base: Baseline,
    directions: Directions,
    layers: Sequence[int],
    sizes: Sequence[int],
    *,
    gates: Gates,
    seed: int,
    on_step: Step,
) -> tuple[list[Stack], str]:
    """Stacks of the first of `layers` in growing `sizes`, up to the first that is no better.

    A larger stack is better if the 95 % interval of the paired difference of its products, against
    the smaller stack and against as many random directions, lies above 0, and its KL passes.

    Returns:
        The stacks that were tried (the last may be the one that was not taken), and why it stopped.
    """
    tried: list[Stack] = []
    smaller: Judged | None = None
    for k in (size for size in sizes if size <= len(layers)):
        basis = stack(directions, layers[:k]).basis
        judged = judge_edit(subject, basis)
        control = judge_edit(subject, random_basis(len(basis), k, seed=seed))
        tried.append(
            Stack(
                k=k,
                layers=tuple(layers[:k]),
                kl=kl_of_edit(subject, base, basis),
                answers=judged.summary,
                random=control.summary,
                over_random=_gain(control, judged, seed),
                over_smaller=_gain(smaller, judged, seed) if smaller else None,
            )
        )
        on_step(f"stack of {k} judged")
        if reason := _no_better(tried[-1], gates):
            return tried, reason
        smaller = judged
    return tried, f"there is no larger stack to try with {len(layers)} layers"


def taken(tried: Sequence[Stack], gates: Gates) -> int:
    """The k of the largest stack that was better than what it replaces; at least 1."""
    return max((s.k for s in tried if not _no_better(s, gates)), default=1)


def random_basis(d_model: int, k: int, *, seed: int) -> Tensor:
    """Q [H, k] of seeded Gaussian directions: a control that knows nothing of the behaviour."""
    generator = torch.Generator().manual_seed(seed + k)
    return orthonormal_basis(torch.randn(k, d_model, generator=generator, dtype=torch.float64))


def _gain(before: Judged, after: Judged, seed: int) -> Estimate | None:
    both = [
        (b, a)
        for b, a in zip(before.products, after.products, strict=True)
        if b is not None and a is not None
    ]
    if not both:
        return None
    return estimate(paired_delta(*map(list, zip(*both, strict=True)), seed=seed))


def _no_better(tried: Stack, gates: Gates) -> str | None:
    """Why this stack is not taken, or None if it is."""
    if tried.k > 1 and tried.kl > gates.max_kl:
        return f"{tried.k} directions move neutral answers too far (KL {tried.kl:.3g} nats)"
    for gain, than in ((tried.over_smaller, "the smaller stack"), (tried.over_random, "random")):
        # without an interval (all differences equal) the value itself decides
        if gain is not None and (gain.value if gain.low is None else gain.low) <= 0:
            return f"{tried.k} directions are not better than {than}: product {_shown(gain)}"
    return None


def _shown(gain: Estimate) -> str:
    interval = "" if gain.low is None else f" [{gain.low:+.3f}, {gain.high:+.3f}]"
    return f"{gain.value:+.3f}{interval}, n = {gain.n}"
