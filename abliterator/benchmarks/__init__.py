"""Benchmarks by lm-eval, and conversations: the effect of an edit, document by document.

`resolve_tasks` checks every task before a model is loaded, `measure_sides` scores *saved*
checkpoints by their paths (so the files that ship are what is measured), each in a process of its
own, and `compare_tasks` pairs base with edited. Only those processes run lm-eval's evaluation.

    tasks = resolve_tasks(["tasks/facts.yaml", "arc_easy"], folder=Path("recipes/demo"))
    sides = {"base": ScoredCheckpoint(base, "..."), "edited": ScoredCheckpoint(edited, "...")}
    settings = RunSettings(section=recipe.benchmarks, chat=recipe.chat)
    scores = measure_sides(sides, tasks, settings, out=Path("benchmarks"))
    compare_tasks(scores["base"], scores["edited"])["arc_easy"].delta  # Estimate(value=-0.004, ...)

A task is a local YAML file in lm-eval's format, or the name of a task, group or tag that lm-eval
brings. A local file is data, not code: tags such as `!function` are refused and its templates are
rendered in a sandbox; lm-eval's own tasks may run code of lm-eval. Each task is evaluated on its
own, so that its scores do not depend on which others are in the recipe. A tag is reported as its
tasks. A group is, too, and where lm-eval gives it a score of its own, so do we: the mean over all
documents, or over its tasks where the group says so. That mean is computed from the documents and
not read from lm-eval, which has no paired difference, interval or p-value of it.

One metric of a task is reported: `acc_norm` for arc_easy, arc_challenge, hellaswag and piqa, as is
usual; else the first of `acc`, `acc_norm`, `exact_match`; else the first metric the task lists.
Within a group, metrics that the group has a score of are preferred to those that it has none of.
Only metrics that are means over documents qualify, since no other can be paired.

The tasks `conversation_*` (`abliterator.benchmarks.conversation`) are no tasks of lm-eval: whoever
has an engine lets it answer them, and `conversation_scores` grades the transcripts.
"""

from __future__ import annotations

from abliterator.benchmarks._compare import compare_tasks
from abliterator.benchmarks._conversations import Transcript, conversation_scores
from abliterator.benchmarks._presets import PRESETS, preset_tasks
from abliterator.benchmarks._scores import (
    Aggregate,
    DocScore,
    TaskScores,
    keep_scores,
    kept_scores,
)
from abliterator.benchmarks._settings import RunSettings, require_engine
from abliterator.benchmarks._subprocess import ScoredCheckpoint, StoppedChild, measure_sides
from abliterator.benchmarks._tasks import Task, is_conversation, resolve_tasks
from abliterator.benchmarks._workers import score_on_workers

__all__ = [
    "PRESETS",
    "Aggregate",
    "DocScore",
    "RunSettings",
    "ScoredCheckpoint",
    "StoppedChild",
    "Task",
    "TaskScores",
    "Transcript",
    "compare_tasks",
    "conversation_scores",
    "is_conversation",
    "keep_scores",
    "kept_scores",
    "measure_sides",
    "preset_tasks",
    "require_engine",
    "resolve_tasks",
    "score_on_workers",
]
