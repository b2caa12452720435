"""Intervals and paired tests, as pure functions of numbers.

A measurement is an `Interval`: a value, its 95 % bounds and n. Bounds that the data cannot
support (n below 2, or every value the same) are None, never a zero-width interval, and no data at
all is None, never 0. The unit of resampling is the prompt; `base` and `edited` are paired by
position, and a delta is always edited - base.

    rate_interval(3, 100)                     # Interval(value=0.03, low=0.0103, high=0.0845, n=100)
    paired_delta([1, 0, 1, 1], [1, 0, 0, 1])  # Interval(value=-0.25, low=-0.75, high=0.0, n=4)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    rate, spread = successes / n, _Z**2 / n
    centre = (rate + spread / 2) / (1 + spread)
    half = math.sqrt(rate * (1 - rate) * spread + (spread / 2) ** 2) / (1 + spread)
    # At the ends the bound is 0 or 1 exactly; rounding must not move it inside.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Interval(rate, low, high, n)


def mean_interval(values: Sequence[float], *, seed: int = 0) -> Interval | None:
    """The mean with a percentile bootstrap interval over prompts; None for no values.

    10,000 seeded resamples. Percentile and not BCa, which is NaN on the many ties of verdicts.

    Raises:
        ValueError: if a value is NaN or infinite.
    """
    data = _finite(values)
    if data.size == 0:
        return None
    mean = float(data.mean())
    if _all_equal(data):
        return Interval(mean, None, None, data.size)
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(_bootstrap_means(data, seed), [tail, 1 - tail])
    return Interval(mean, float(low), float(high), data.size)


def paired_delta(
    base: Sequence[float], edited: Sequence[float], *, seed: int = 0
) -> Interval | None:
    """The mean of edited - base with a bootstrap interval over the pairs; None for no pairs.

    Raises:
        ValueError: if the lengths differ, or a value is NaN or infinite.
    """
    return mean_interval(_differences(base, edited).tolist(), seed=seed)


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
    from scipy.stats import t

    data, g = _finite([value, *left_out])[1:], len(left_out)
    if g < 2 or _all_equal(data):
        return Interval(value, None, None, n)
    se = math.sqrt((g - 1) / g * float(((data - data.mean()) ** 2).sum()))
    half = float(t.ppf((1 + _LEVEL) / 2, g - 1)) * se
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


def sign_flip_test(base: Sequence[float], edited: Sequence[float], *, seed: int = 0) -> float:
    """Two-sided p of the paired permutation test: the mean difference, each sign flipped or not.

    Pairs without a difference do not move the statistic and are left out. Up to 13 that remain are
    enumerated (exact); beyond that 9,999 seeded random flips.

    Raises:
        ValueError: if the lengths differ, or a value is NaN or infinite.
    """
    changes = _differences(base, edited)
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


def holm(p_values: Sequence[float]) -> list[float]:
    """Step-down p-values of several tests, each in its place (Holm 1979): 5 % family-wise error."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    scaled = (min(1.0, (len(order) - rank) * p_values[i]) for rank, i in enumerate(order))
    adjusted = dict(zip(order, accumulate(scaled, max), strict=True))
    return [adjusted[i] for i in range(len(p_values))]


def smallest_detectable(base: Sequence[float], edited: Sequence[float]) -> float | None:
    """The smallest true mean delta this n could have shown: 80 % power, two-sided 5 % level.

    (t[.975] + t[.80]) sd / sqrt(n), with the sd of the paired differences and n - 1 degrees of
    freedom. None when n is below 2 or all differences are equal: then the data say nothing about
    their spread.

    Raises:
        ValueError: if the lengths differ, or a value is NaN or infinite.
    """
    changes = _differences(base, edited)
    if changes.size < 2 or _all_equal(changes):
        return None
    from scipy.stats import t

    quantiles = np.sum(t.ppf([(1 + _LEVEL) / 2, _POWER], changes.size - 1))
    return float(quantiles * changes.std(ddof=1) / math.sqrt(changes.size))


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
