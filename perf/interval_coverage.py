"""Coverage of the intervals of clustered answers, by simulation.

Answers of a cluster (those to one prompt, or to prompts of one form) share a rate of their own,
which is beta distributed between clusters. For every number and size of clusters, correlation
within them and rate: how often 95 % intervals contain the truth. "mixed" clusters have 1 to 8
answers. A delta without an interval, since no pair changed, is left out.

    python perf/interval_coverage.py                # about two minutes on one core
    python perf/interval_coverage.py --trials 2000  # standard error of a cell: 0.5 %
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from abliterator.statistics import Interval, clustered_rate, paired_delta, rate_interval
from abliterator.tables import markdown_table

CLUSTERS = (10, 20, 50, 100)
SIZES = ("1", "2", "4", "8", "mixed")
CORRELATIONS = (0.0, 0.2, 0.5, 0.8)
RATES = (0.05, 0.1, 0.2, 0.5, 0.8, 0.95)
LOST = 0.4  # share of the refusals of the base that are not refusals of the edited model

HEAD = ("", "clustered rate", "Wilson of all answers", "clustered delta", "delta of all pairs")


class Cell(NamedTuple):
    """A simulated situation, and the share of intervals with the truth in them."""

    clusters: int
    size: str
    correlation: float
    rate: float
    covered: tuple[float, ...]


def main() -> None:
    """Simulates every cell and prints the means by each of its four properties."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=400, help="samples of each cell")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    cells = [
        Cell(*cell, simulated(rng, *cell, trials=arguments.trials))
        for cell in itertools.product(CLUSTERS, SIZES, CORRELATIONS, RATES)
    ]
    rows = [("all", cells), *groups(cells)]
    print(markdown_table(HEAD, [[name, *means(part)] for name, part in rows]))
    for column, name in enumerate(HEAD[1:]):
        values = [cell.covered[column] for cell in cells]
        inside = np.mean([0.93 <= value <= 0.97 for value in values])
        worst = cells[int(np.nanargmin(values))]
        print(
            f"{name}: {inside:.0%} of cells from 93 to 97 %; "
            f"least {np.nanmin(values):.3f} at {worst[:4]}"
        )


def groups(cells: Sequence[Cell]) -> Iterator[tuple[str, list[Cell]]]:
    """The cells by each value of each property, with a name."""
    for field, name in enumerate(Cell._fields[:4]):
        for value in dict.fromkeys(cell[field] for cell in cells):
            yield f"{name} {value}", [cell for cell in cells if cell[field] == value]


def means(cells: Sequence[Cell]) -> list[str]:
    """The mean coverage of each interval."""
    return [f"{value:.3f}" for value in np.nanmean([cell.covered for cell in cells], axis=0)]


def simulated(
    rng: np.random.Generator, clusters: int, size: str, correlation: float, rate: float, trials: int
) -> tuple[float, ...]:
    """Coverage of the four intervals in one situation; NaN where none of a kind was given."""
    inside: list[list[bool]] = [[], [], [], []]
    for _ in range(trials):
        sizes = np.full(clusters, int(size)) if size != "mixed" else rng.integers(1, 9, clusters)
        own = np.full(clusters, rate)
        if correlation:
            spread = (1 - correlation) / correlation
            own = rng.beta(rate * spread, (1 - rate) * spread, clusters)
        labels = np.repeat(np.arange(clusters), sizes)
        base = (rng.random(labels.size) < own[labels]).astype(float)
        edited = np.where(rng.random(labels.size) < LOST, 0.0, base)
        names = labels.tolist()
        intervals = (
            (clustered_rate(base.tolist(), names), rate),
            (rate_interval(int(base.sum()), base.size), rate),
            (paired_delta(base.tolist(), edited.tolist(), clusters=names), -LOST * rate),
            (plain_delta(base, edited), -LOST * rate),
        )
        for column, (interval, truth) in zip(inside, intervals, strict=True):
            if interval is not None and interval.low is not None and interval.high is not None:
                column.append(interval.low <= truth <= interval.high)
    return tuple(float(np.mean(column)) if column else np.nan for column in inside)


def plain_delta(base: np.ndarray, edited: np.ndarray) -> Interval | None:
    """The t interval of single pairs, as the bootstrap of pairs is for many, but faster."""
    changes = edited - base
    if np.ptp(changes) == 0:
        return None
    half = 1.96 * changes.std(ddof=1) / np.sqrt(changes.size)
    mean = float(changes.mean())
    return Interval(mean, mean - half, mean + half, changes.size)


if __name__ == "__main__":
    main()
