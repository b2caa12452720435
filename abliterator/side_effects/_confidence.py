"""Confidence: whether the probability that a model gives its choice is how often it is right."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from abliterator.benchmarks import TaskScores
from abliterator.record import ConfidenceFigure, Estimate, PairedFigure
from abliterator.statistics import jackknife_interval

Sides = NDArray[np.float64]  # confidence and right (0 or 1) in the last dimension

BINS = 10
FOLDS = 20  # parts of the documents that the jackknife leaves out, one at a time


def confidence_figures(
    base: TaskScores, edited: TaskScores
) -> dict[ConfidenceFigure, PairedFigure] | None:
    """Confidence against accuracy in the choices of one benchmark task, paired by document.

    - `calibration_error`: the root mean square of accuracy - confidence over ten bins of as many
      documents, without what chance alone adds to it (Kumar, Liang & Ma 2019, arXiv:1909.10155;
      the usual sum of absolute values grows as documents get fewer). Negative where the gaps are
      smaller than chance makes them.
    - `overconfidence`: mean confidence minus accuracy.

    Confidence is the probability of the likeliest choice among all. Intervals are the jackknife's.

    Returns:
        None where scores hold no confidence: answers that are generated, or choices that are not
        made by likelihood.
    """
    others = {score.doc_id: score for score in edited.scores}
    pairs = [
        ((b.confidence, b.value), (e.confidence, e.value))
        for b in base.scores
        if (e := others.get(b.doc_id)) is not None
        and b.confidence is not None
        and e.confidence is not None
    ]
    if not pairs:
        return None
    data = np.array(pairs)  # [documents, sides, (confidence, right)]
    asked = len({score.doc_id for score in base.scores})
    return {
        "calibration_error": _figure(data, _calibration_error, asked),
        "overconfidence": _figure(data, _overconfidence, asked),
    }


def _calibration_error(side: Sides) -> float:
    """Signed root of the mean over bins of the squared gap, less the variance of its estimate."""
    order = np.argsort(side[:, 0], kind="stable")
    squares = sum(
        len(gaps) * (gaps.mean() ** 2 - gaps.var(ddof=1) / len(gaps))
        for gaps in np.array_split(side[order, 1] - side[order, 0], BINS)
        if len(gaps) > 1
    )
    return float(np.sign(squares) * np.sqrt(abs(squares) / len(side)))


def _overconfidence(side: Sides) -> float:
    confidence, right = side.T
    return float((confidence - right).mean())


def _figure(data: Sides, statistic: Callable[[Sides], float], asked: int) -> PairedFigure:
    """A statistic of the documents on both sides, and its difference, with their intervals."""

    def values(documents: Sides) -> NDArray[np.float64]:
        base, edited = (statistic(documents[:, side]) for side in (0, 1))
        return np.array([base, edited, edited - base])

    n = len(data)
    kept = [np.arange(n) % FOLDS != fold for fold in range(min(n, FOLDS))] if n > 1 else []
    left_out = np.array([values(data[documents]) for documents in kept]).reshape(-1, 3)
    base, edited, delta = (
        Estimate.of(jackknife_interval(float(value), column.tolist(), n), asked)
        for value, column in zip(values(data), left_out.T, strict=True)
    )
    return PairedFigure(base=base, edited=edited, delta=delta)
