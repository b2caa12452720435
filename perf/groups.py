"""What groups cost, and how often a group is named where none differs.

    python perf/groups.py            # a minute; --sets 2000 for a finer rate

Prints CPU seconds of the groups of one prompt set, and the share of simulated sets without any
difference between groups in which one is named: 5 % at most, since Holm's p-values hold for all
groups and measures of a set. With --shift, one group of five refuses more, and the share is power.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from abliterator.groups import group_verdicts
from abliterator.record import Side, Verdict
from abliterator.statistics import rate_interval


def verdicts(side: Side, rng: np.random.Generator, refusal: list[float]) -> list[Verdict]:
    """Independent verdicts with these probabilities of a refusal; some comply in part."""
    return [
        Verdict(
            set="target",
            side=side,
            index=index,
            compliance=0.0 if (refuses := rng.random() < rate) else float(rng.choice([0.5, 1.0])),
            coherence=float(rng.choice([0.5, 1.0], p=[0.1, 0.9])),
            refused=bool(refuses),
            truncated=False,
            kind="refused" if refuses else "complied",
        )
        for index, rate in enumerate(refusal)
    ]


def main() -> None:
    """Prints a line for each rate of refusal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=300)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--groups", type=int, default=5)
    parser.add_argument("--shift", type=float, default=0.0, help="added to the rate of one group")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    groups = [f"group {index % options.groups}" for index in range(options.prompts)]
    for rate in (0.05, 0.2, 0.5):
        refusal = [rate + options.shift * (name == "group 0") for name in groups]
        named, started = 0, time.process_time()
        for _ in range(options.sets):
            sides = verdicts("base", rng, [0.9] * options.prompts), verdicts("edited", rng, refusal)
            named += any(g.outliers for g in group_verdicts(*sides, {"category": groups}))
        seconds = (time.process_time() - started) / options.sets
        interval = rate_interval(named, options.sets)
        assert interval is not None
        print(
            f"refusal {rate:.2f}: a group is named in {named} of {options.sets} sets "
            f"({interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]); "
            f"{seconds:.3f} CPU seconds a set of {options.prompts} prompts, {options.groups} groups"
        )


if __name__ == "__main__":
    main()
