"""What the conversation suite tells apart, for every two of some checkpoints.

    python perf/conversation_power.py OUT BASE SOUND STRONG          # folders; OUT keeps answers
    python perf/conversation_power.py OUT BASE STRONG --given        # a fraction of the time

Each checkpoint holds the suite's conversations once, on the CPU in float32; with `--given` those
alone whose earlier answers are given, so that the model answers once. For every two checkpoints the
table has the paired delta with its interval, the exact McNemar p, and how many conversations
would show a true delta of that size with 80 % power at the 5 % level.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from abliterator import statistics
from abliterator.benchmarks.conversation import (
    SKILLS,
    Item,
    Skill,
    items_of,
    max_new_tokens,
    passes,
)
from abliterator.engines import Engine, open_engine
from abliterator.evaluation import answer_conversations, spoken
from abliterator.model import render_prompts
from abliterator.tables import markdown_table

Values = dict[str, list[float]]


def items(skill: Skill, *, given: bool) -> list[Item]:
    """The conversations of a skill; with `given`, those of one answer."""
    return [item for item in items_of(skill) if not given or len(item.prompt.turns) == 1]


def measured(folder: Path, out: Path, *, given: bool) -> Values:
    """1 or 0 of each conversation, by skill; what `out` has is not measured again."""
    kept = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    engine = None
    for skill in SKILLS:
        if skill not in kept:
            engine = engine or open_engine(folder, device="cpu", dtype="float32")
            start = time.process_time()
            kept[skill] = answered(engine, skill, items(skill, given=given))
            right = sum(value for value, _ in kept[skill])
            seconds = time.process_time() - start
            print(
                f"{out.stem} {skill}: {right} of {len(kept[skill])}, {seconds:.0f} CPU s",
                flush=True,
            )
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    return {skill: [float(value) for value, _ in kept[skill]] for skill in SKILLS}


def answered(engine: Engine, skill: Skill, some: Sequence[Item]) -> list[tuple[int, str]]:
    """Whether each last answer is right, and the answer; tools are described by the user."""
    limit = max_new_tokens(skill)
    transcripts = answer_conversations(
        engine,
        [item.described for item in some],
        lambda prompts: render_prompts(engine.tokenizer, prompts, engine.limits, name=skill),
        max_new_tokens=limit,
        batch_size=10,
    )
    return [
        (
            int(passes(item.check, spoken(own)[-1], truncated=own[-1].finish_reason == "length")),
            text,
        )
        for item, own in zip(some, transcripts, strict=True)
        for text in spoken(own)[-1:]
    ]


def rows(before: Values, after: Values) -> list[list[str]]:
    """The table of two checkpoints: all conversations, then each skill."""
    groups = {"all": [*SKILLS], **{skill: [skill] for skill in SKILLS}}
    pairs = {
        name: tuple([v for skill in skills for v in side[skill]] for side in (before, after))
        for name, skills in groups.items()
    }
    p = {
        name: statistics.mcnemar_exact([*map(bool, a)], [*map(bool, b)])
        for name, (a, b) in pairs.items()
    }
    return [
        [
            name,
            str(len(a)),
            f"{sum(a) / len(a):.2f}",
            f"{sum(b) / len(b):.2f}",
            shown(statistics.paired_delta(a, b)),
            f"{p[name]:.2g}",
            needed(a, b),
        ]
        for name, (a, b) in pairs.items()
    ]


def shown(delta: statistics.Interval | None) -> str:
    """A delta with its interval, if it has one."""
    assert delta is not None
    value, low, high, _ = delta
    return f"{value:+.2f}" + (f" [{low:+.2f}, {high:+.2f}]" if low is not None else "")


def needed(before: Sequence[float], after: Sequence[float]) -> str:
    """Conversations that would show a true delta of the size that was measured."""
    smallest = statistics.smallest_detectable(before, after)
    delta = (sum(after) - sum(before)) / len(before)
    return (
        "-" if not (smallest and delta) else str(math.ceil(len(before) * (smallest / delta) ** 2))
    )


def main() -> None:
    """Prints a table for every two checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--given", action="store_true")
    arguments = parser.parse_args()
    values = {
        str(folder): measured(
            folder,
            arguments.out
            / f"{'-'.join(folder.resolve().parts[-2:])}{'-given' * arguments.given}.json",
            given=arguments.given,
        )
        for folder in arguments.checkpoints
    }
    heads = ["", "n", "first", "second", "delta", "p", "n needed"]
    for one, other in combinations(values, 2):
        print(f"\n{one} -> {other}\n")
        print(markdown_table(heads, rows(values[one], values[other])))


if __name__ == "__main__":
    main()
