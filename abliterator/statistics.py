"""Intervals and paired tests, as pure functions of numbers.

A measurement is an `Interval`: a value, its 95 % bounds and n. Bounds that the data cannot
support (n below 2, or every value the same) are None, never a zero-width interval, and no data at
all is None, never 0. The unit of resampling is the prompt; `base` and `edited` are paired by
position, and a delta is always edited - base.

Values that resemble each other are named by `clusters`, one label a value: the answers to one
prompt, or prompts of one form. What is independent then are the clusters.

    rate_interval(3, 100)                     # Interval(value=0.03, low=0.0103, high=0.0845, n=100)
    paired_delta([1, 0, 1, 1], [1, 0, 0, 1])  # Interval(value=-0.25, low=-0.75, high=0.0, n=4)
    clustered_rate([1, 1, 0, 0], "aabb")      # two prompts with two answers each
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_LEVEL = 0.95
_POWER = 0.80
_RESAMPLES = 10_000

_TABLES = 4_000_000  # ways to share three values between two groups that are counted one by one
_BLOCK = 500_000  # resampled counts held at once: 4 MB, whatever n is
_Z = 1.959963984540054  # two-sided normal quantile of _LEVEL


class Interval(NamedTuple):
    """A value with its 95 % interval; `low` and `high` are None where no interval can be given."""

    value: float
    low: float | None
    high: float | None
    n: int


def rate_interval(successes: int, n: int) -> Interval | None:
    """Wilson's score interval of a rate (Wilson 1927, doi:10.2307/2276774); None when n is 0.

    Unlike a bootstrap it has a width at 0/n and n/n: 0 of 100 is [0, 0.037].

    Raises:
        ValueError: unless 0 <= successes <= n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must be between 0 and n, got {successes} of {n}")
    if n == 0:
        return None
    return Interval(successes / n, *_wilson(successes / n, n), n)


def clustered_rate(values: Sequence[float], clusters: Sequence[Hashable]) -> Interval | None:
    """The mean of values from 0 to 1 that resemble each other within clusters; None without any.

    Wilson's interval with the effective n: n over the design effect, which is the variance of the
    mean (jackknife over clusters) relative to that of n independent answers, and over (t / z)² for
    the few clusters that it is estimated from (Korn & Graubard 1998, Survey Methodology 24:193;
    with Wilson's interval: Franco et al. 2019, PMC6690503). It is never more than n, and the number
    of clusters where all values are 0 or all are 1.

    Args:
        values: such as whether each answer was a refusal.
        clusters: the cluster of each.

    Raises:
        ValueError: unless there is one cluster a value, and all values are from 0 to 1.
    """
    data, of_value = _finite(values), _numbered(clusters, len(values))
    if data.size == 0:
        return None
    if data.min() < 0 or data.max() > 1:
        raise ValueError("values must be from 0 to 1")
    n, mean = data.size, float(data.mean())
    groups = int(of_value.max()) + 1
    if groups == n:
        effective = float(n)
    elif data.max() == 0 or data.min() == 1:
        effective = float(groups)
    elif groups == 1:
        return Interval(mean, None, None, n)
    else:
        error = _jackknife_error(_left_out(data, of_value))
        variance = (error * _t_sum(groups - 1, (1 + _LEVEL) / 2) / _Z) ** 2
        effective = mean * (1 - mean) / max(variance, mean * (1 - mean) / n)
    return Interval(mean, *_wilson(mean, effective), n)


def _wilson(rate: float, n: float) -> tuple[float, float]:
    """Wilson's bounds of a rate of n trials."""
    spread = _Z**2 / n
    centre = (rate + spread / 2) / (1 + spread)
    half = math.sqrt(rate * (1 - rate) * spread + (spread / 2) ** 2) / (1 + spread)
    # At the ends the bound is 0 or 1 exactly; rounding must not move it inside.
    return 0.0 if rate == 0 else centre - half, 1.0 if rate == 1 else centre + half


def mean_interval(
    values: Sequence[float], *, clusters: Sequence[Hashable] | None = None, seed: int = 0
) -> Interval | None:
    """The mean with a percentile bootstrap interval over prompts; None for no values.

    10,000 seeded resamples. Percentile and not BCa, which is NaN on the many ties of verdicts. With
    clusters of several values: the delete-a-cluster jackknife with t of one less than their number
    (MacKinnon, Nielsen & Webb 2022, arXiv:2205.03288), since a bootstrap of few clusters is too
    narrow.

    Args:
        values: one a prompt, or an answer.
        clusters: the cluster of each value; each its own unless given.
        seed: of the bootstrap.

    Raises:
        ValueError: if a value is NaN or infinite, or clusters are not as many as values.
    """
    data = _finite(values)
    if data.size == 0:
        return None
    mean = float(data.mean())
    if (of_value := _several(clusters, data.size)) is not None:
        return jackknife_interval(mean, _left_out(data, of_value).tolist(), data.size)
    if _all_equal(data):
        return Interval(mean, None, None, data.size)
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(_bootstrap_means(data, seed), [tail, 1 - tail])
    return Interval(mean, float(low), float(high), data.size)


def paired_delta(
    base: Sequence[float],
    edited: Sequence[float],
    *,
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Interval | None:
    """The mean of edited - base, with the interval of `mean_interval` over the pairs.

    Raises:
        ValueError: if the lengths differ, or a value is NaN or infinite.
    """
    return mean_interval(_differences(base, edited).tolist(), clusters=clusters, seed=seed)


def jackknife_interval(value: float, left_out: Sequence[float], n: int) -> Interval:
    """A statistic of all data, with the interval of a delete-a-group jackknife.

    se² = (g - 1) / g Σ (v_i - mean v)², and t with g - 1 degrees of freedom (Shao & Tu 1995, 2.3).

    Args:
        value: of all data.
        left_out: the same without each of g groups of about one size.
        n: how many data there are.

    Raises:
        ValueError: if a value is NaN or infinite.
    """
    data = _finite([value, *left_out])[1:]
    if data.size < 2 or _all_equal(data):
        return Interval(value, None, None, n)
    half = _t_sum(data.size - 1, (1 + _LEVEL) / 2) * _jackknife_error(data)
    return Interval(value, value - half, value + half, n)


def mcnemar_exact(base: Sequence[bool], edited: Sequence[bool]) -> float:
    """Two-sided p of the exact McNemar test: are changes to 1 as frequent as changes to 0?

    Only pairs that changed count; without any, p is 1.

    Raises:
        ValueError: if the lengths differ.
    """
    changes = _differences([float(b) for b in base], [float(e) for e in edited])
    gained, lost = int((changes > 0).sum()), int((changes < 0).sum())
    if gained + lost == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost, 0.5).pvalue)


def sign_flip_test(
    base: Sequence[float],
    edited: Sequence[float],
    *,
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> float:
    """Two-sided p of the paired permutation test: the mean difference, each sign flipped or not.

    Pairs without a difference do not move the statistic and are left out. Up to 13 that remain are
    enumerated (exact); beyond that 9,999 seeded random flips. The pairs of a cluster are flipped
    together.

    Raises:
        ValueError: if the lengths differ, or a value is NaN or infinite.
    """
    changes = _differences(base, edited)
    if (of_pair := _several(clusters, changes.size)) is not None:
        changes = np.bincount(of_pair, changes).astype(np.float64)
    changes = changes[changes != 0]
    if changes.size < 2:  # scipy needs two; a single pair is as likely either way
        return 1.0
    from scipy.stats import permutation_test

    result = permutation_test(
        (changes,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=_RESAMPLES - 1,
        rng=seed,
    )
    return float(result.pvalue)


def relabelling_test(group: Sequence[float], rest: Sequence[float], *, seed: int = 0) -> float:
    """Two-sided p of the permutation test of two means: each way to label the values is as likely.

    Exact where there are at most three different values (a verdict's grades), for which the
    labellings are counted by how many of each value they give to the group; else 9,999 seeded
    random ones. p is the share that differs from the mean of all at least as much as the group.

    Raises:
        ValueError: if a value is NaN or infinite.
    """
    levels, counts = np.unique(_finite([*group, *rest]), return_counts=True)
    n = len(group)
    if n == 0 or len(rest) == 0 or levels.size == 1:
        return 1.0
    expected = n * float(levels @ counts) / counts.sum()
    deviation = abs(float(np.sum(group)) - expected) - 1e-9  # equal sums may differ by rounding
    if levels.size > 3 or (counts[0] + 1) * (counts[1] + 1) > _TABLES:
        rng = np.random.default_rng(seed)
        drawn = rng.multivariate_hypergeometric(counts, n, _RESAMPLES - 1, method="marginals")
        return float(1 + (abs(drawn @ levels - expected) >= deviation).sum()) / _RESAMPLES
    tables = np.stack(np.meshgrid(*(np.arange(c + 1) for c in counts[:-1]), indexing="ij"), -1)
    tables = tables.reshape(-1, levels.size - 1)
    last = n - tables.sum(1)
    tables = np.column_stack([tables, last])[(last >= 0) & (last <= counts[-1])]
    from scipy.special import gammaln

    ways = (-gammaln(tables + 1) - gammaln(counts - tables + 1)).sum(1)
    shares = np.exp(ways - ways.max())
    extreme = abs(tables @ levels - expected) >= deviation
    return float(shares[extreme].sum() / shares.sum())


def monte_carlo_p(observed: float, null: Sequence[float]) -> float:
    """One-sided p of a value among draws of its null distribution: (1 + c) / (1 + draws).

    c counts draws that reach the value, so that the value itself is one of those that could have
    been: p is never 0, and its least value is 1 / (1 + draws) (Phipson & Smyth 2010,
    doi:10.2202/1544-6115.1585).

    Raises:
        ValueError: if a value is NaN or infinite.
    """
    data = _finite([observed, *null])
    # equal means may differ by rounding
    return float(1 + (data[1:] >= data[0] - 1e-9).sum()) / data.size


def holm(p_values: Sequence[float]) -> list[float]:
    """Step-down p-values of several tests, each in its place (Holm 1979): 5 % family-wise error."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    scaled = (min(1.0, (len(order) - rank) * p_values[i]) for rank, i in enumerate(order))
    adjusted = dict(zip(order, accumulate(scaled, max), strict=True))
    return [adjusted[i] for i in range(len(p_values))]


def smallest_detectable(
    base: Sequence[float], edited: Sequence[float], *, clusters: Sequence[Hashable] | None = None
) -> float | None:
    """The smallest true mean delta this n could have shown: 80 % power, two-sided 5 % level.

    (t[.975] + t[.80]) sd / sqrt(n), with the sd of the paired differences and n - 1 degrees of
    freedom; of clusters, their jackknife error and number. None when n is below 2 or all
    differences are equal: then the data say nothing about their spread.

    Raises:
        ValueError: if the lengths differ, or a value is NaN or infinite.
    """
    changes = _differences(base, edited)
    if changes.size < 2 or _all_equal(changes):
        return None
    quantiles = (1 + _LEVEL) / 2, _POWER
    if (of_pair := _several(clusters, changes.size)) is not None:
        left_out = _left_out(changes, of_pair)
        if left_out.size < 2 or _all_equal(left_out):
            return None
        return _t_sum(left_out.size - 1, *quantiles) * _jackknife_error(left_out)
    return float(
        _t_sum(changes.size - 1, *quantiles) * changes.std(ddof=1) / math.sqrt(changes.size)
    )


def _numbered(clusters: Sequence[Hashable], n: int) -> NDArray[np.intp]:
    """The clusters of n values as numbers from 0, in the order of their first values."""
    if len(clusters) != n:
        raise ValueError(f"each value needs one cluster, got {len(clusters)} for {n} values")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in clusters], dtype=np.intp)


def _several(clusters: Sequence[Hashable] | None, n: int) -> NDArray[np.intp] | None:
    """The clusters as numbers; None where every value is a cluster of its own."""
    if clusters is None:
        return None
    of_value = _numbered(clusters, n)
    return None if n == 0 or of_value.max() + 1 == n else of_value


def _left_out(data: NDArray[np.float64], of_value: NDArray[np.intp]) -> NDArray[np.float64]:
    """The means without each of the clusters; empty where there is one."""
    sizes, totals = np.bincount(of_value), np.bincount(of_value, data)
    if sizes.size < 2:
        return np.empty(0)
    means: NDArray[np.float64] = (data.sum() - totals) / (data.size - sizes)
    return means


def _jackknife_error(left_out: NDArray[np.float64]) -> float:
    """Standard error of a statistic of which these are its values without each of g groups."""
    g = left_out.size
    return math.sqrt((g - 1) / g * float(((left_out - left_out.mean()) ** 2).sum()))


def _t_sum(freedom: int, *levels: float) -> float:
    """The sum of quantiles of the t distribution."""
    from scipy.stats import t

    return float(np.sum(t.ppf(levels, freedom)))


def _bootstrap_means(data: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Means of _RESAMPLES resamples of `data` [n], float64.

    How often each *distinct* value is drawn is multinomial, so that resampling ten thousand
    verdicts costs three columns and not ten thousand.
    """
    levels, counts = np.unique(data, return_counts=True)
    shares = counts / data.size
    rng = np.random.default_rng(seed)
    rows = max(1, _BLOCK // levels.size)
    blocks = [
        rng.multinomial(data.size, shares, size=min(rows, _RESAMPLES - start)) @ levels
        for start in range(0, _RESAMPLES, rows)
    ]
    return np.concatenate(blocks) / data.size


def _differences(base: Sequence[float], edited: Sequence[float]) -> NDArray[np.float64]:
    """Edited - base, pair by pair [n]."""
    if len(base) != len(edited):
        raise ValueError(f"base and edited must pair up, got {len(base)} and {len(edited)} values")
    return _finite(edited) - _finite(base)


def _finite(values: Sequence[float]) -> NDArray[np.float64]:
    """`values` as float64 [n]; refuses NaN, which would spread to every derived figure."""
    data = np.asarray(values, dtype=np.float64)
    if not np.isfinite(data).all():
        raise ValueError("values must be finite; leave out what was not measured")
    return data


def _all_equal(data: NDArray[np.float64]) -> bool:
    """Whether the values differ by no more than the rounding of a subtraction."""
    return bool(np.ptp(data) <= 1e-12 * np.abs(data).max())
