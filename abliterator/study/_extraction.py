"""What padding does to a direction: left-padded batches against one prompt at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from abliterator.capture import Padding, capture
from abliterator.directions import Directions, fit_directions
from abliterator.errors import PromptError
from abliterator.model import LoadedModel
from abliterator.record import Estimate
from abliterator.statistics import jackknife_interval
from abliterator.study._bench import Step
from abliterator.study._types import Agreement, Study
from abliterator.subspace import MomentSet, merged

FOLDS = 8  # parts of the prompts, each of which is left out once

Folds = list[MomentSet]


class _Way(NamedTuple):
    """Moments of both sets, fold by fold, extracted in one way."""

    target: Folds
    contrast: Folds

    def directions(self, folds: Sequence[int]) -> Directions:
        return fit_directions(*(merged([side[i] for i in folds]) for side in self))


def study_extraction(
    loaded: LoadedModel,
    target: Sequence[Sequence[int]],
    contrast: Sequence[Sequence[int]],
    *,
    blocks: Sequence[str],
    position: int = -1,
    max_batch_tokens: int = 4096,
    on_step: Step = lambda what: None,
) -> Study:
    """The direction of every layer, extracted in both ways from the same prompts.

    The interval is a jackknife over eighths of the prompts, which are captured apart.

    Args:
        loaded: the model; the dtype of computation is what padding acts through.
        target: token ids, one rendered prompt each.
        contrast: the same.
        blocks: module paths of all blocks, in order.
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
    captured = partial(capture, loaded, blocks=blocks, position=position)

    def way(padding: Padding, tokens: int) -> _Way:
        sides: list[Folds] = [[], []]
        for side, prompts in zip(sides, (target, contrast), strict=True):
            for fold in range(FOLDS):
                part = prompts[fold::FOLDS]
                side.append(captured(part, padding=padding, max_batch_tokens=tokens))
                on_step("left-padded" if padding == "left" else "one by one")
        return _Way(*sides)

    padded, alone = way("left", max_batch_tokens), way("none", 1)
    return Study(
        name="extraction",
        asks="Does it matter for a direction whether its prompts ran in left-padded batches?",
        agreements=_agreements(padded, alone, n=min(len(target), len(contrast))),
    )


def _agreements(padded: _Way, alone: _Way, *, n: int) -> tuple[Agreement, ...]:
    every = range(FOLDS)
    without = [[i for i in every if i != fold] for fold in every]
    apart = _apart(padded.directions(every), alone.directions(every))
    left_out = [_apart(padded.directions(kept), alone.directions(kept)) for kept in without]
    halves = 1 - _apart(alone.directions(every[::2]), alone.directions(every[1::2]))
    lengths = [way.directions(every).vectors.norm(dim=1) for way in (padded, alone)]
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
