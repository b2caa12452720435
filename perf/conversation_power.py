"""What the conversation suite tells apart, for every two of some checkpoints.

    python perf/conversation_power.py OUT BASE SOUND STRONG # folders; OUT keeps scores

Each checkpoint holds the 120 conversations once (on the CPU, float32). For every two of them the
table has the paired delta with its interval, p and Holm's p, and how many conversations would show
a true delta of that size with 80 % power at the 5 % level.
"""

from __future__ import annotations

import argparse
import math
import time
from itertools import combinations
from pathlib import Path

from abliterator.benchmarks import (
    Task,
    TaskScores,
    compare_tasks,
    keep_scores,
    kept_scores,
    resolve_tasks,
)
from abliterator.engines import Engine, open_engine
from abliterator.evaluation import score_conversations
from abliterator.recipe import Benchmarks, Chat
from abliterator.record import BenchmarkResult
from abliterator.tables import markdown_table


def scores_of(folder: Path, tasks: list[Task], out: Path) -> dict[str, TaskScores]:
    """The scores of a checkpoint; those that `out` has are not measured again."""
    section, engine = Benchmarks(tasks=("conversation",), batch_size=20), None
    scores = {}
    for task in tasks:
        kept = kept_scores(out, task.name, task.digest)
        if kept is None:
            engine = engine or opened(folder)
            start = time.process_time()
            kept = score_conversations(engine, task, section, Chat(), settings={})
            keep_scores(out, task.digest, kept)
            right = sum(score.value for score in kept.scores)
            print(
                f"{out.name}: {task.name} {right:.0f} of {kept.n}, "
                f"{time.process_time() - start:.0f} CPU seconds",
                flush=True,
            )
        scores[task.name] = kept
    return scores


def opened(folder: Path) -> Engine:
    """The checkpoint's engine in this process."""
    return open_engine(folder, device="cpu", dtype="float32")


def needed(result: BenchmarkResult) -> str:
    """Conversations that would show a true delta of the size that was measured."""
    if result.smallest_detectable is None or result.delta.value == 0:
        return "-"
    return str(math.ceil(result.n * (result.smallest_detectable / result.delta.value) ** 2))


def main() -> None:
    """Prints a table for every two checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--tasks", default="conversation", help="names, between commas")
    arguments = parser.parse_args()
    tasks = resolve_tasks(arguments.tasks.split(","), folder=Path.cwd())
    scores = {
        str(folder): scores_of(folder, tasks, arguments.out / "-".join(folder.resolve().parts[-2:]))
        for folder in arguments.checkpoints
    }
    for one, other in combinations(scores, 2):
        print(f"\n{one} -> {other}\n")
        rows = [
            [
                name,
                str(result.n),
                f"{result.base.value:.2f}",
                f"{result.edited.value:.2f}",
                f"{result.delta:+.3f}",
                f"+{result.gained} -{result.lost}",
                f"{result.p_value:.3g}",
                f"{result.p_holm:.3g}",
                needed(result),
            ]
            for name, result in compare_tasks(scores[one], scores[other]).items()
        ]
        heads = ["task", "n", "first", "second", "delta", "changed", "p", "Holm", "n needed"]
        print(markdown_table(heads, rows))


if __name__ == "__main__":
    main()
