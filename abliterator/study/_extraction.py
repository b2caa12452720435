"""The effect of padding on directions: left-padded batches against one prompt at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from abliterator.capture import capture
from abliterator.directions import Directions, fit_directions
from abliterator.engines import Engine, Padding
from abliterator.errors import PromptError
from abliterator.evaluation import OnStep
from abliterator.record import Agreement, Estimate, Study
from abliterator.statistics import jackknife_interval
from abliterator.subspace import MomentSet, merged

FOLDS = 8  # parts of the prompts, each of which is left out once

Folds = list[MomentSet]


class _Moments(NamedTuple):
    """Moments of both sets, fold by fold, with one kind of padding."""

    target: Folds
    contrast: Folds

    def directions(self, folds: Sequence[int]) -> Directions:
        return fit_directions(*(merged([side[i] for i in folds]) for side in self))


def study_extraction(
    engine: Engine,
    target: Sequence[Sequence[int]],
    contrast: Sequence[Sequence[int]],
    *,
    position: int = -1,
    max_batch_tokens: int = 4096,
    on_step: OnStep = lambda step: None,
) -> Study:
    """The direction of every layer, extracted in both ways from the same prompts.

    The interval is a jackknife over eighths of the prompts, which are captured separately.

    Args:
        engine: the model; the dtype of computation is what padding acts through.
        target: token ids, one rendered prompt each.
        contrast: the same.
        position: counted from the end of each prompt.
        max_batch_tokens: tokens in a padded batch.
        on_step: called after each part that was captured.

    Raises:
        PromptError: for fewer prompts than parts.
    """
    if min(len(target), len(contrast)) < FOLDS:
        raise PromptError(
            f"The study of extraction needs {FOLDS} prompts of each kind, for an interval, and "
            f"got {len(target)} and {len(contrast)}. Give more prompts."
        )
    capture_fold = partial(capture, engine, position=position)

    def moments(padding: Padding, tokens: int) -> _Moments:
        sides: list[Folds] = [[], []]
        for side, prompts in zip(sides, (target, contrast), strict=True):
            for fold in range(FOLDS):
                fold_prompts = prompts[fold::FOLDS]
                side.append(capture_fold(fold_prompts, padding=padding, max_batch_tokens=tokens))
                on_step("left-padded" if padding == "left" else "one by one")
        return _Moments(*sides)

    padded, unpadded = moments("left", max_batch_tokens), moments("none", 1)
    return Study(
        name="extraction",
        asks="Does it matter for a direction whether its prompts ran in left-padded batches?",
        agreements=_agreements(padded, unpadded, n=min(len(target), len(contrast))),
    )


def _agreements(padded: _Moments, unpadded: _Moments, *, n: int) -> tuple[Agreement, ...]:
    folds = range(FOLDS)
    folds_without_one = [[i for i in folds if i != fold] for fold in folds]
    apart = _half_squared_distance(padded.directions(folds), unpadded.directions(folds))
    left_out = [
        _half_squared_distance(padded.directions(some_folds), unpadded.directions(some_folds))
        for some_folds in folds_without_one
    ]
    halves = 1 - _half_squared_distance(
        unpadded.directions(folds[::2]), unpadded.directions(folds[1::2])
    )
    lengths = [moments.directions(folds).vectors.norm(dim=1) for moments in (padded, unpadded)]
    return tuple(
        Agreement(
            layer=row + 1,
            apart=_estimate(float(apart[row]), [float(estimate[row]) for estimate in left_out], n),
            length=float(lengths[0][row] / lengths[1][row]),
            halves=float(halves[row]),
        )
        for row in range(len(apart))
    )


def _half_squared_distance(a: Directions, b: Directions) -> torch.Tensor:
    """1 - cosine of every layer [L], as half the squared distance of the unit vectors.

    Where two directions agree, 1 minus a cosine would be rounding error alone.
    """
    units = [torch.nn.functional.normalize(d.vectors, dim=1) for d in (a, b)]
    return (units[0] - units[1]).square().sum(dim=1) / 2


def _estimate(value: float, left_out: Sequence[float], n: int) -> Estimate:
    interval = jackknife_interval(value, left_out, n)
    # no two directions are nearer than 0, whatever a symmetric interval says
    low = None if interval.low is None else max(0.0, interval.low)
    return Estimate(value=value, low=low, high=interval.high, n=n)
