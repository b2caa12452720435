"""What padding does to a direction: left-padded batches against one prompt at a time."""

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
    on_step: OnStep = lambda what: None,
) -> Study:
    """The direction of every layer, extracted in both ways from the same prompts.

    The interval is a jackknife over eighths of the prompts, which are captured apart.

    Args:
        engine: the model; the dtype of computation is what padding acts through.
        target: token ids, one rendered prompt each.
        contrast: the same.
        position: counted from the end of each prompt.
        max_batch_tokens: tokens in a padded batch.
        on_step: hears of each part that was captured.

    Raises:
        PromptError: for fewer prompts than parts.
    """
    if min(len(target), len(contrast)) < FOLDS:
        raise PromptError(
            f"The study of extraction needs {FOLDS} prompts of each kind, for an interval, and "
            f"got {len(target)} and {len(contrast)}. Give more prompts."
        )
    captured = partial(capture, engine, position=position)

    def moments(padding: Padding, tokens: int) -> _Moments:
        sides: list[Folds] = [[], []]
        for side, prompts in zip(sides, (target, contrast), strict=True):
            for fold in range(FOLDS):
                part = prompts[fold::FOLDS]
                side.append(captured(part, padding=padding, max_batch_tokens=tokens))
                on_step("left-padded" if padding == "left" else "one by one")
        return _Moments(*sides)

    padded, alone = moments("left", max_batch_tokens), moments("none", 1)
    return Study(
        name="extraction",
        asks="Does it matter for a direction whether its prompts ran in left-padded batches?",
        agreements=_agreements(padded, alone, n=min(len(target), len(contrast))),
    )


def _agreements(padded: _Moments, alone: _Moments, *, n: int) -> tuple[Agreement, ...]:
    every = range(FOLDS)
    without = [[i for i in every if i != fold] for fold in every]
    apart = _apart(padded.directions(every), alone.directions(every))
    left_out = [_apart(padded.directions(kept), alone.directions(kept)) for kept in without]
    halves = 1 - _apart(alone.directions(every[::2]), alone.directions(every[1::2]))
    lengths = [each.directions(every).vectors.norm(dim=1) for each in (padded, alone)]
    return tuple(
        Agreement(
            layer=row + 1,
            apart=_estimate(float(apart[row]), [float(one[row]) for one in left_out], n),
            length=float(lengths[0][row] / lengths[1][row]),
            halves=float(halves[row]),
        )
        for row in range(len(apart))
    )


def _apart(a: Directions, b: Directions) -> torch.Tensor:
    """1 - cosine of every layer [L], as half the squared distance of the unit vectors.

    The difference of 1 and a cosine would have nothing but rounding left where they agree.
    """
    units = [torch.nn.functional.normalize(d.vectors, dim=1) for d in (a, b)]
    return (units[0] - units[1]).square().sum(dim=1) / 2


def _estimate(value: float, left_out: Sequence[float], n: int) -> Estimate:
    found = jackknife_interval(value, left_out, n)
    # no two directions are nearer than 0, whatever a symmetric interval says
    low = None if found.low is None else max(0.0, found.low)
    return Estimate(value=value, low=low, high=found.high, n=n)
