"""Intervals and tests over clusters: simulated coverage, plain forms as oracles, negatives."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from abliterator.statistics import (
    Interval,
    clustered_rate,
    mean_interval,
    paired_delta,
    rate_interval,
    sign_flip_test,
    smallest_detectable,
)

GRADES = st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=30)


def answers(rng, clusters, size, correlation, rate):
    """Answers 0 or 1 of clusters whose own rates are beta distributed, and the clusters' labels."""
    spread = (1 - correlation) / correlation
    own = rng.beta(rate * spread, (1 - rate) * spread, clusters)
    values = (rng.random((size, clusters)) < own).T.ravel().astype(float)
    return values.tolist(), np.repeat(np.arange(clusters), size).tolist()


@pytest.mark.parametrize(
    ("clusters", "size", "correlation"), [(10, 8, 0.2), (25, 4, 0.5), (50, 4, 0.8), (100, 2, 0.8)]
)
def test_intervals_of_clusters_cover_and_those_of_answers_do_not(clusters, size, correlation):
    """300 samples at each of four rates; perf/interval_coverage.py has the whole table."""
    rng = np.random.default_rng(0)
    covered, unclustered, means = [], [], []
    for rate in (0.1, 0.3, 0.5, 0.9):
        for _ in range(300):
            values, labels = answers(rng, clusters, size, correlation, rate)
            clustered = clustered_rate(values, labels)
            plain = rate_interval(int(sum(values)), len(values))
            mean = mean_interval(values, clusters=labels)
            covered.append(clustered.low <= rate <= clustered.high)
            unclustered.append(plain.low <= rate <= plain.high)
            if 0.2 < rate < 0.8:
                means.append(mean.low <= rate <= mean.high)
    assert 0.93 <= np.mean(covered) <= 0.97
    assert 0.92 <= np.mean(means) <= 0.98  # of 600
    assert np.mean(unclustered) < 0.91


def test_deltas_of_clusters_cover():
    rng = np.random.default_rng(1)
    covered = []
    for _ in range(500):
        base, labels = answers(rng, 30, 4, 0.5, 0.7)
        edited = np.where(rng.random(120) < 0.4, 0.0, base).tolist()  # 40 % of refusals go
        delta = paired_delta(base, edited, clusters=labels)
        covered.append(delta.low <= -0.28 <= delta.high)
    assert 0.92 <= np.mean(covered) <= 0.98


@given(GRADES)
def test_clusters_of_one_value_are_no_clusters(values):
    labels, base = list(range(len(values))), values[::-1]
    assert mean_interval(values, clusters=labels) == mean_interval(values)
    assert paired_delta(base, values, clusters=labels) == paired_delta(base, values)
    assert sign_flip_test(base, values, clusters=labels) == sign_flip_test(base, values)
    assert smallest_detectable(base, values, clusters=labels) == smallest_detectable(base, values)
    whole = [float(value == 1) for value in values]
    plain = rate_interval(int(sum(whole)), len(whole))
    assert clustered_rate(whole, labels) == pytest.approx(plain)


def test_of_equal_clusters_a_mean_has_the_t_interval_of_their_means():
    values = np.random.default_rng(0).random((8, 5))
    found = mean_interval(values.ravel().tolist(), clusters=np.repeat(range(8), 5).tolist())
    means = values.mean(axis=1)
    wanted = stats.t.interval(0.95, 7, loc=means.mean(), scale=stats.sem(means))
    assert (found.low, found.high) == pytest.approx(wanted)
    assert found.n == 40


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=20))
def test_answers_that_repeat_each_other_are_worth_one(values):
    """Four equal answers a prompt say no more than one, but for t in place of z."""
    often, labels = np.repeat(values, 4).tolist(), np.repeat(range(len(values)), 4).tolist()
    once, repeated = clustered_rate(values, labels[::4]), clustered_rate(often, labels)
    assert repeated.value == once.value
    assert repeated.high - repeated.low >= once.high - once.low - 1e-12
    assert repeated.n == 4 * once.n


@given(GRADES, st.integers(1, 6))
def test_a_clustered_rate_is_within_its_scale_and_no_narrower_than_n_allows(values, clusters):
    labels = [i % clusters for i in range(len(values))]
    interval = clustered_rate(values, labels)
    mirrored = clustered_rate([1 - value for value in values], labels)
    assert interval.value == pytest.approx(np.mean(values))
    if interval.low is None:
        assert len(set(labels)) == 1
        return
    assert 0 <= interval.low <= interval.value + 1e-12
    assert interval.value - 1e-12 <= interval.high <= 1
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - interval.high, 1 - interval.low))


def test_none_of_four_answers_to_twenty_prompts_is_none_of_twenty():
    labels = np.repeat(range(20), 4).tolist()
    found, plain = clustered_rate([0.0] * 80, labels), rate_interval(0, 20)
    assert (found.low, found.high, found.n) == (plain.low, pytest.approx(plain.high), 80)


def test_one_cluster_has_no_interval():
    assert mean_interval([0.0, 1.0], clusters="aa") == Interval(0.5, None, None, 2)
    assert clustered_rate([0.0, 1.0], "aa") == Interval(0.5, None, None, 2)
    assert smallest_detectable([0.0, 0.0], [0.0, 1.0], clusters="aa") is None
    assert sign_flip_test([0.0, 0.0], [0.0, 1.0], clusters="aa") == 1.0
    assert clustered_rate([], []) is None


def test_signs_of_a_cluster_flip_together():
    """All sign patterns of the clusters, enumerated; one pair at a time would be surer of it."""
    changes = [0.5, 1.0, 0.5, 0.5, -0.5, 1.0, 0.0, 0.5]
    labels = [0, 0, 1, 1, 2, 2, 3, 3]
    sums = np.array([1.5, 1.0, 0.5, 0.5])
    flips = np.array(list(itertools.product([-1, 1], repeat=4)))
    expected = (np.abs(flips @ sums) >= sums.sum() - 1e-12).mean()
    assert sign_flip_test([0.0] * 8, changes, clusters=labels) == pytest.approx(expected)
    assert sign_flip_test([0.0] * 8, changes) < expected


def test_more_answers_of_the_same_prompts_detect_little_more():
    rng = np.random.default_rng(0)
    base, labels = answers(rng, 60, 4, 0.9, 0.5)
    edited = [0.0] * 240
    apart = smallest_detectable(base, edited)
    together = smallest_detectable(base, edited, clusters=labels)
    assert together > 1.7 * apart


@pytest.mark.parametrize("function", [mean_interval, clustered_rate])
def test_every_value_needs_a_cluster(function):
    with pytest.raises(ValueError, match="one cluster, got 1 for 2"):
        function([0.0, 1.0], clusters=["a"])


def test_a_rate_is_of_values_from_0_to_1():
    with pytest.raises(ValueError, match="from 0 to 1"):
        clustered_rate([0.0, 1.5], "ab")
