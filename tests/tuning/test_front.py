"""The front of trials, and which of them is preferred."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abliterator.errors import DirectionError
from abliterator.record import Estimate, Trial
from abliterator.tuning import TunedEdit, prefer
from abliterator.tuning._trials import with_front
from tests.tuning.contexts import basis_of


def trial(product, kl, *, refusal=0.0, asked=None):
    def estimate(value):
        return Estimate(value=value, low=None, high=None, n=asked or 32, asked=asked)

    return Trial(
        kl_weight=1.0,
        scale=1.0,
        cosine=1.0,
        kl=kl,
        kl_first_token=kl,
        refusal=estimate(refusal),
        compliance=estimate(product),
        coherence=estimate(1.0),
        product=estimate(product),
    )


SPREAD = st.lists(
    st.tuples(st.integers(0, 8).map(lambda i: i / 8), st.integers(0, 8).map(lambda i: i / 80)),
    min_size=1,
    max_size=8,
)


@given(SPREAD)
def test_the_front_is_what_nothing_beats(values):
    found = with_front([trial(*value) for value in values])
    for (product, kl), told in zip(values, found, strict=True):
        beaten = any((p >= product and k <= kl) and (p > product or k < kl) for p, k in values)
        assert told.on_front is not beaten


@given(SPREAD)
def test_what_is_preferred_is_near_the_best_product_and_no_other_such_moves_less(values):
    trials = [trial(*value) for value in values]
    product, kl = values[prefer(trials, "product")]
    best = max(p for p, _ in values)
    assert product >= best - 0.02
    assert kl == min(k for p, k in values if p >= best - 0.02)


def test_limits_come_before_the_product():
    trials = [trial(0.9, 0.2, refusal=0.0), trial(0.6, 0.01, refusal=0.2), trial(0.1, 0.001)]
    assert prefer(trials, "product") == 0
    assert prefer(trials, "kl_at_most", 0.02) == 1
    assert prefer(trials, "refusals_at_most", 0.1) == 2  # the least KL among those that keep it
    with pytest.raises(DirectionError, match=r"keeps to 0\.0001 .*; the nearest has 0\.001"):
        prefer(trials, "kl_at_most", 0.0001)
    assert prefer(trials, "product", max_kl=0.1) == 1


def test_what_dropped_out_is_not_preferred():
    trials = [trial(0.5, 0.1, asked=32), trial(1.0, 0.2, asked=8), trial(0.4, 0.01, asked=32)]
    assert prefer(trials, "product") == 0
    assert prefer(trials, "refusals_at_most", 0.1) == 2
    assert prefer(trials[1:], "kl_at_most", 0.05) == 1
    with pytest.raises(DirectionError, match="keeps to"):
        prefer(trials, "kl_at_most", 0.001)


def test_a_weaker_edit_is_the_same_subspace():
    edit = TunedEdit(basis_of(1), {"a": 1.0, "b": 0.4})
    weaker = edit.scaled(0.5)
    assert weaker.strengths == {"a": 0.5, "b": 0.2}
    assert torch.equal(weaker.basis, edit.basis)
