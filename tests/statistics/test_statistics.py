"""Intervals and paired tests: scipy, enumeration and simulated coverage as oracles."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from abliterator.statistics import (
    Interval,
    holm,
    jackknife_interval,
    mcnemar_exact,
    mean_interval,
    monte_carlo_p,
    paired_delta,
    rate_interval,
    relabelling_test,
    sign_flip_test,
    smallest_detectable,
)

VERDICTS = st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=40)


# Rates


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 100), (3, 100), (50, 77), (9, 9)])
def test_wilson_agrees_with_scipy(successes, n):
    interval = rate_interval(successes, n)
    expected = stats.binomtest(successes, n).proportion_ci(method="wilson")
    assert interval.value == successes / n
    assert interval.n == n
    assert interval.low == pytest.approx(expected.low, abs=1e-12)
    assert interval.high == pytest.approx(expected.high, abs=1e-12)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_symmetric_and_contains_the_rate(case):
    successes, n = case
    interval, mirrored = rate_interval(successes, n), rate_interval(n - successes, n)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1
    assert interval.low < interval.high
    assert mirrored.low == pytest.approx(1 - interval.high, abs=1e-12)
    assert mirrored.high == pytest.approx(1 - interval.low, abs=1e-12)


def test_no_trials_have_no_rate():
    assert rate_interval(0, 0) is None


@pytest.mark.parametrize(("successes", "n"), [(-1, 5), (6, 5), (0, -1)])
def test_impossible_counts_are_refused(successes, n):
    with pytest.raises(ValueError, match="between 0 and n"):
        rate_interval(successes, n)


def test_wilson_covers_the_true_rate():
    """Exact, from the binomial distribution, averaged over rates as a card may meet them."""
    for n in (50, 100, 500):
        bounds = [rate_interval(k, n) for k in range(n + 1)]
        low, high = np.array([b.low for b in bounds]), np.array([b.high for b in bounds])
        rates = np.linspace(0.02, 0.98, 193)
        inside = (low <= rates[:, None]) & (rates[:, None] <= high)
        chance = stats.binom.pmf(np.arange(n + 1), n, rates[:, None])
        assert 0.93 <= (chance * inside).sum(axis=1).mean() <= 0.97


# Means


def test_mean_interval_agrees_with_scipys_percentile_bootstrap():
    values = np.random.default_rng(1).gamma(2.0, size=60)
    interval = mean_interval(values.tolist())
    expected = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=100_000, rng=2
    ).confidence_interval
    width = expected.high - expected.low
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(expected.low, abs=0.03 * width)
    assert interval.high == pytest.approx(expected.high, abs=0.03 * width)


def test_mean_interval_agrees_with_the_enumerated_bootstrap():
    """All 4^4 resamples of four values; the seeded quantiles must be among the exact ones."""
    values = [0.0, 0.5, 1.0, 1.0]
    exact = np.array([np.mean(sample) for sample in itertools.product(values, repeat=4)])
    interval = mean_interval(values)
    assert interval.low == pytest.approx(np.quantile(exact, 0.025), abs=1e-12)
    assert interval.high == pytest.approx(np.quantile(exact, 0.975), abs=1e-12)


@given(VERDICTS, st.integers(0, 5))
def test_mean_interval_is_seeded_and_within_the_data(values, seed):
    interval = mean_interval(values, seed=seed)
    assert interval == mean_interval(values, seed=seed)
    assert interval.value == pytest.approx(np.mean(values))
    if len(set(values)) == 1:
        assert (interval.low, interval.high) == (None, None)
    else:
        assert min(values) <= interval.low <= interval.value <= interval.high <= max(values)


def test_another_seed_gives_another_interval():
    values = np.random.default_rng(0).normal(size=50).tolist()
    assert mean_interval(values, seed=0) != mean_interval(values, seed=1)


def test_order_does_not_matter():
    values = np.random.default_rng(0).normal(size=200)
    forwards, backwards = mean_interval(values.tolist()), mean_interval(values[::-1].tolist())
    assert forwards == pytest.approx(backwards)


@pytest.mark.parametrize("values", [[0.25], [0.0, 0.0], [1.0] * 100, [0.3 - 0.1, 0.2]])
def test_what_does_not_vary_has_no_interval(values):
    assert mean_interval(values) == Interval(np.mean(values), None, None, len(values))


def test_nothing_has_no_mean():
    assert mean_interval([]) is None
    assert paired_delta([], []) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_a_number_is_refused(bad):
    with pytest.raises(ValueError, match="finite"):
        mean_interval([0.5, bad])


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng, n: rng.choice([0.0, 0.5, 1.0], p=[0.2, 0.2, 0.6], size=n),
        lambda rng, n: rng.choice([-1.0, 0.0, 1.0], p=[0.05, 0.8, 0.15], size=n),
        lambda rng, n: rng.gamma(1.5, size=n),
    ],
    ids=["verdicts", "flips", "divergences"],
)
def test_mean_interval_covers_the_true_mean(draw, monkeypatch):
    """800 samples of 100 prompts; 1,000 resamples each, for speed, change coverage by 0.2 %."""
    monkeypatch.setattr("abliterator.statistics._RESAMPLES", 1000)
    rng = np.random.default_rng(0)
    truth = draw(rng, 2_000_000).mean()
    intervals = [mean_interval(draw(rng, 100).tolist(), seed=trial) for trial in range(800)]
    covered = np.mean([i.low <= truth <= i.high for i in intervals])
    assert 0.93 <= covered <= 0.97


# Pairs


@pytest.mark.parametrize(
    ("n", "right", "gained", "lost"),
    [(500, 0.7, 0.1, 0.08), (500, 0.7, 0.02, 0.03), (1000, 0.8, 0.02, 0.01)],
)
def test_paired_delta_covers_the_true_delta(n, right, gained, lost, monkeypatch):
    """800 pairs of models on n documents, of which a few change; 1,000 resamples each."""
    monkeypatch.setattr("abliterator.statistics._RESAMPLES", 1000)
    rng = np.random.default_rng(0)
    truth = (1 - right) * gained - right * lost
    covered = 0
    for trial in range(800):
        base, flip = rng.random(n) < right, rng.random(n)
        edited = np.where(base, flip >= lost, flip < gained)
        found = paired_delta(base.astype(float).tolist(), edited.astype(float).tolist(), seed=trial)
        covered += found.low <= truth <= found.high
    assert 0.93 <= covered / 800 <= 0.97


@given(VERDICTS)
def test_delta_is_edited_minus_base(base):
    edited = [1 - value for value in base]
    interval = paired_delta(base, edited)
    assert interval.value == pytest.approx(np.mean(edited) - np.mean(base))
    assert interval.n == len(base)


def test_delta_of_a_side_with_itself_is_zero_without_an_interval():
    assert paired_delta([0, 1, 0.5], [0, 1, 0.5]) == Interval(0.0, None, None, 3)


def test_pairing_narrows_the_interval():
    """Sides that share their prompts' difficulty: shuffling one of them must lose that."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=100)
    edited = base + 0.1 + 0.05 * rng.normal(size=100)
    paired = paired_delta(base.tolist(), edited.tolist())
    unpaired = paired_delta(base.tolist(), rng.permutation(edited).tolist())
    assert paired.high - paired.low < 0.1 * (unpaired.high - unpaired.low)


@pytest.mark.parametrize(
    "function", [paired_delta, mcnemar_exact, sign_flip_test, smallest_detectable]
)
def test_sides_must_pair_up(function):
    with pytest.raises(ValueError, match="pair up, got 2 and 3"):
        function([0, 1], [0, 1, 1])


def enumerated_p(changes):
    """Share of all sign patterns with a mean at least as far from 0 as the one seen."""
    flips = np.array(list(itertools.product([-1, 1], repeat=len(changes))))
    means = (flips * np.asarray(changes)).mean(axis=1)
    return float((np.abs(means) >= abs(np.mean(changes)) - 1e-12).mean())


@given(st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0]), min_size=0, max_size=9))
def test_sign_flips_agree_with_enumeration(changes):
    expected = enumerated_p(changes) if changes else 1.0
    assert sign_flip_test([0.0] * len(changes), changes) == pytest.approx(expected)


def test_many_sign_flips_are_seeded_and_near_the_normal_limit():
    rng = np.random.default_rng(0)
    base, change = rng.normal(size=200), rng.normal(0.15, 1.0, size=200)
    edited = (base + change).tolist()
    p = sign_flip_test(base.tolist(), edited, seed=3)
    assert p == sign_flip_test(base.tolist(), edited, seed=3)
    assert p == pytest.approx(stats.ttest_1samp(change, 0).pvalue, abs=0.01)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=11))
def test_mcnemar_is_the_sign_test_of_the_flips(pairs):
    base, edited = [b for b, _ in pairs], [e for _, e in pairs]
    changes = [float(e) - float(b) for b, e in pairs if b != e]
    expected = enumerated_p(changes) if changes else 1.0
    assert mcnemar_exact(base, edited) == pytest.approx(expected)
    assert mcnemar_exact(edited, base) == pytest.approx(expected)


def test_mcnemar_of_many_one_sided_flips():
    assert mcnemar_exact([False] * 10, [True] * 10) == pytest.approx(2 / 2**10)
    assert mcnemar_exact([True, False], [True, False]) == 1.0


# Power


@pytest.mark.parametrize("n", [10, 40, 200])
def test_smallest_detectable_is_detected_four_times_in_five(n):
    rng = np.random.default_rng(0)
    changes = rng.normal(size=n)
    changes = (changes - changes.mean()) / changes.std(ddof=1)
    delta = smallest_detectable([0.0] * n, changes.tolist())
    trials = rng.normal(delta, 1.0, size=(20_000, n))
    power = (stats.ttest_1samp(trials, 0, axis=1).pvalue < 0.05).mean()
    assert power == pytest.approx(0.80, abs=0.02)


def test_smallest_detectable_needs_a_spread():
    assert smallest_detectable([], []) is None
    assert smallest_detectable([0.0], [1.0]) is None
    assert smallest_detectable([0.0, 0.0], [1.0, 1.0]) is None


def test_four_times_the_prompts_detect_half_the_delta():
    base, edited = [0.0, 0.0, 1.0, 1.0] * 100, [0.0, 1.0, 1.0, 0.0] * 100
    few, many = smallest_detectable(base, edited), smallest_detectable(base * 4, edited * 4)
    assert many == pytest.approx(few / 2, rel=0.01)


def test_the_jackknife_of_a_mean_is_the_t_interval():
    data = np.random.default_rng(0).normal(size=12)
    left_out = [float(np.delete(data, i).mean()) for i in range(12)]
    found = jackknife_interval(float(data.mean()), left_out, 12)
    wanted = stats.t.interval(0.95, 11, loc=data.mean(), scale=stats.sem(data))
    assert (found.low, found.high) == pytest.approx(wanted)


def test_the_jackknife_covers_a_ratio():
    """What it is for: a statistic that is no mean, by groups. 95 % of 400, give or take 4 %."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        data = rng.normal((3.0, 2.0), 1.0, size=(80, 2))
        groups = [np.delete(data, slice(i, None, 8), axis=0) for i in range(8)]
        ratio = [float(part[:, 0].mean() / part[:, 1].mean()) for part in (data, *groups)]
        found = jackknife_interval(ratio[0], ratio[1:], 80)
        covered += found.low < 1.5 < found.high
    assert 0.91 < covered / 400 < 0.99


def test_a_jackknife_without_spread_has_no_interval():
    assert jackknife_interval(2.0, [2.0, 2.0], 10) == Interval(2.0, None, None, 10)
    with pytest.raises(ValueError, match="finite"):
        jackknife_interval(2.0, [math.nan, 2.0], 10)


GRADES = st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=6)


@given(GRADES, GRADES)
def test_relabelling_counts_every_way_to_share_the_values(group, rest):
    values = [*group, *rest]
    expected = len(group) * math.fsum(values) / len(values)
    sums = [math.fsum(drawn) for drawn in itertools.combinations(values, len(group))]
    observed = abs(math.fsum(group) - expected)
    share = sum(abs(s - expected) >= observed - 1e-9 for s in sums) / len(sums)
    assert relabelling_test(group, rest) == pytest.approx(share)


def test_relabelling_of_two_rates_is_fishers_test_where_that_is_symmetric():
    found = relabelling_test([1.0] * 9 + [0.0], [1.0] + [0.0] * 9)
    assert found == pytest.approx(stats.fisher_exact([[9, 1], [1, 9]]).pvalue)


def test_relabelling_of_many_values_agrees_with_scipy():
    rng = np.random.default_rng(0)
    group, rest = rng.normal(0.6, 1.0, 15), rng.normal(0.0, 1.0, 30)
    wanted = stats.permutation_test(
        (group, rest), lambda a, b, axis: a.mean(axis) - b.mean(axis), vectorized=True, rng=1
    )
    assert relabelling_test(group, rest) == pytest.approx(wanted.pvalue, abs=0.01)


@pytest.mark.parametrize(("group", "rest"), [([], [1.0]), ([1.0], []), ([1.0, 1.0], [1.0])])
def test_relabelling_what_cannot_differ(group, rest):
    assert relabelling_test(group, rest) == 1.0


def test_relabelling_refuses_nan():
    with pytest.raises(ValueError, match="finite"):
        relabelling_test([math.nan], [1.0])


def test_a_monte_carlo_p_counts_the_draws_that_reach_the_value():
    assert monte_carlo_p(0.5, [0.1, 0.5, 0.9]) == 3 / 4
    assert monte_carlo_p(0.9, [0.1] * 99) == 1 / 100
    assert monte_carlo_p(0.3, [0.1 + 0.2]) == 1  # equal but for rounding
    assert monte_carlo_p(0.0, []) == 1
    with pytest.raises(ValueError, match="finite"):
        monte_carlo_p(math.nan, [1.0])


def test_a_monte_carlo_p_is_below_a_level_no_more_often_than_the_level():
    """Where the value is a draw of the null itself, ties included."""
    draws = np.random.default_rng(0).integers(0, 8, size=(2000, 20)) / 8
    p = np.array([monte_carlo_p(row[0], row[1:]) for row in draws])
    for level in (0.05, 0.1, 0.25, 0.5):
        assert (p <= level).mean() <= level + 3 * math.sqrt(level * (1 - level) / 2000)


def test_holm_on_known_values():
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
