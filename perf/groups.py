"""What groups cost, and how often a group is named where none differs.

    python perf/groups.py            # a minute; --sets 2000 for a finer rate
    python perf/groups.py --out OUT  # what groups and side effects add to the build in OUT

Prints CPU seconds of the groups of one prompt set, and the share of simulated sets without any
difference between groups in which one is named: 5 % at most, since Holm's p-values hold for all
groups and measures of a set. With --shift, one group of five refuses more, and the share is power.
With --out, the prompts of a build are divided into five groups, and the CPU seconds of groups, side
effects and confidence are compared with the seconds that its stages took.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from abliterator.groups import group_verdicts
from abliterator.record import Completion, RunRecord, Side, Verdict
from abliterator.side_effects import side_effects
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


def cost(out: Path) -> str:
    """CPU seconds that groups and side effects take on the answers of a build, and their share."""
    record = RunRecord.model_validate_json(
        (out / "checkpoint" / "abliterator" / "record.json").read_text()
    )
    answers = [
        Completion.model_validate_json(line)
        for line in (out / "work" / "rollouts.jsonl").read_text().splitlines()
    ]
    graded = [
        Verdict.model_validate_json(line)
        for line in (out / "work" / "verdicts.jsonl").read_text().splitlines()
    ]
    side_effects(answers[:1], answers[:1])  # what the judge has loaded before, in a build
    sets = dict.fromkeys(answer.set for answer in answers)
    started = time.process_time()
    for name in sets:
        sides: list[list[Verdict]] = [
            [v for v in graded if (v.set, v.side) == (name, side)] for side in ("base", "edited")
        ]
        groups = [f"group {index % 5}" for index in range(len(sides[0]))]
        group_verdicts(*sides, {"category": groups})
    seconds = [time.process_time() - started]
    for name in sets:
        side_effects(
            *(
                [a for a in answers if (a.set, a.side) == (name, side)]
                for side in ("base", "edited")
            )
        )
    seconds.append(time.process_time() - started - seconds[0])
    total = sum(record.timing.values())
    return (
        f"groups {seconds[0]:.2f} s, side effects {seconds[1]:.2f} s: {sum(seconds) / total:.2%} "
        f"of {total:.0f} s, with {len(answers)} answers of {len(sets)} sets"
    )


def main() -> None:
    """Prints a line for each rate of refusal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=300)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--groups", type=int, default=5)
    parser.add_argument("--shift", type=float, default=0.0, help="added to the rate of one group")
    parser.add_argument("--out", type=Path, help="folder of a finished build")
    options = parser.parse_args()
    if options.out:
        print(cost(options.out))
        return
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
