"""How often p-values of the study `controls` reject where nothing is there, by simulation.

Target and contrast prompts are drawn from one distribution, so that no labelling differs from
another. The statistic is how much of the mean difference's direction lies along a fixed line, as
for an edit of which only the direction counts. Shuffled labels are halves with as many prompts of
each kind (`halves`), or any labelling (`all`); p should be at most a level as often as it says.

    python perf/shuffled_labels.py    # about ten seconds on one core
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray

from abliterator.statistics import monte_carlo_p
from abliterator.tables import markdown_table

PROMPTS = (8, 16, 48, 144)  # of each kind
LEVELS = (0.01, 0.05, 0.1)
DRAWS = 99
SPREADS = np.geomspace(4, 0.3, 40)  # of the stream's dimensions: a few are large
LINE = 3  # the dimension along which the statistic looks


def labels(rng: np.random.Generator, n: int, *, halves: bool) -> NDArray[np.float64]:
    """Shuffled labels [DRAWS, 2 n] of n target prompts and then n contrast prompts, 1 or -1."""
    half = np.where(np.arange(n) % 2 == 0, 1.0, -1.0)
    parts = np.stack([[half, half]] * DRAWS) if halves else np.stack([[half.repeat(2)]] * DRAWS)
    return rng.permuted(parts, axis=-1).reshape(DRAWS, 2 * n)


def rejections(rng: np.random.Generator, n: int, trials: int, *, halves: bool) -> list[str]:
    """The share of trials in which p is at most each level."""
    p_values = []
    for _ in range(trials):
        vectors = rng.standard_normal((2 * n, len(SPREADS))) * SPREADS
        true = np.repeat([1.0, -1.0], n)[None]
        differences = np.concatenate([true, labels(rng, n, halves=halves)]) @ vectors
        observed, *null = differences[:, LINE] ** 2 / (differences**2).sum(axis=1)
        p_values.append(monte_carlo_p(observed, null))
    return [f"{np.mean(np.array(p_values) <= level + 1e-12):.3f}" for level in LEVELS]


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1500)
    trials = parser.parse_args().trials
    rng = np.random.default_rng(0)
    rows = [
        [str(n), name, *rejections(rng, n, trials, halves=name == "halves")]
        for n in PROMPTS
        for name in ("halves", "all")
    ]
    print(markdown_table(["prompts of each kind", "labels", *map(str, LEVELS)], rows))


if __name__ == "__main__":
    main()
