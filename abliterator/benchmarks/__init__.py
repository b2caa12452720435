"""Benchmarks by lm-eval: what the edit cost, document by document.

`resolve_tasks` checks every task before anything heavy runs, `run_tasks` scores a *saved*
checkpoint by its path (so the files that ship are what is measured), and `compare_tasks` pairs base
with edited. The room knows nothing of recipes, edits or our own prompts.

    tasks = resolve_tasks(["tasks/facts.yaml", "arc_easy"], folder=Path("recipes/demo"))
    base = run_tasks(base_folder, tasks, batch_size=16, limit=500)
    edited = run_tasks(edited_folder, tasks, batch_size=16, limit=500)
    compare_tasks(base, edited)["arc_easy"].delta  # Estimate(value=-0.004, low=-0.016, ...)

A task is a local YAML file in lm-eval's format, or the name of a task that lm-eval brings. A local
file is data, not code: tags such as `!function` are refused and its templates are rendered in a
sandbox. Each task is evaluated on its own, so that its scores do not depend on which others are in
the recipe.

One metric of a task is reported: `acc_norm` for arc_easy, arc_challenge, hellaswag and piqa, as is
usual; else the first of `acc`, `acc_norm`, `exact_match`; else the first metric the task lists.
Only metrics that are means over documents qualify, since no other can be paired.
"""

from __future__ import annotations

from abliterator.benchmarks._compare import compare_tasks
from abliterator.benchmarks._run import run_tasks
from abliterator.benchmarks._scores import DocScore, TaskScores
from abliterator.benchmarks._tasks import Task, resolve_tasks

__all__ = ["DocScore", "Task", "TaskScores", "compare_tasks", "resolve_tasks", "run_tasks"]
