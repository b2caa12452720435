"""Confidence in benchmark choices, base and edited, paired by document."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from abliterator.benchmarks import TaskScores
from abliterator.side_effects import confidence_figures


def scores(confidences: Sequence[float | None], right: Sequence[object]) -> TaskScores:
    hashes = dict.fromkeys(("doc_hash", "prompt_hash", "target_hash"), "0")
    documents = [
        {"doc_id": i, "filter": "none", "value": float(bool(r)), "confidence": c, **hashes}
        for i, (c, r) in enumerate(zip(confidences, right, strict=True))
    ]
    return TaskScores.model_validate(
        {
            "task": "toy",
            "metric": "acc",
            "n": len(documents),
            "higher_is_better": True,
            "scores": documents,
            "settings": {},
        }
    )


def drawn(rng: np.random.Generator, n: int, *, shift: float) -> TaskScores:
    """A model that is right as often as it says, less `shift`."""
    confidences = rng.uniform(0.3, 1.0, n)
    return scores(confidences.tolist(), (rng.random(n) < confidences - shift).tolist())


def test_a_known_case():
    """Each of ten bins: confidence 0.75, and 1 of 2 right, of which chance makes (0.5 / 2)^2."""
    side = scores([0.75] * 20, [1, 0] * 10)
    figures = confidence_figures(side, side)
    squared = 0.25**2 - 0.5 / 2
    assert figures["calibration_error"].base.value == pytest.approx(-((-squared) ** 0.5))
    assert figures["overconfidence"].base.value == pytest.approx(0.25)
    assert figures["calibration_error"].delta.value == 0.0
    assert figures["calibration_error"].delta.low is None  # the same documents, no spread


def test_an_overconfident_edit_is_told_apart_and_the_interval_holds():
    rng = np.random.default_rng(0)
    covered = {"calibration_error": 0, "overconfidence": 0}
    for _ in range(100):
        figures = confidence_figures(drawn(rng, 400, shift=0.0), drawn(rng, 400, shift=0.2))
        for name, figure in figures.items():
            covered[name] += figure.delta.low < 0.2 < figure.delta.high
            assert figure.delta.value > 0
    assert min(covered.values()) >= 90


def test_a_model_that_is_right_as_often_as_it_says_has_no_error_at_any_n():
    rng = np.random.default_rng(1)
    values = []
    for _ in range(50):
        side = drawn(rng, 60, shift=0.0)
        values.append(confidence_figures(side, side)["calibration_error"].base.value)
    assert abs(np.mean(values)) < 0.03


def test_scores_without_confidence_are_not_measured():
    generated = scores([None] * 3, [1, 0, 1])
    assert confidence_figures(generated, generated) is None
    some = confidence_figures(
        scores([0.5, None, 0.7], [1, 0, 1]), scores([0.5, 0.4, 0.6], [1, 0, 0])
    )
    assert (some["overconfidence"].delta.n, some["overconfidence"].delta.asked) == (2, 3)
