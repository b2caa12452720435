"""The scores of one task on one checkpoint, by document; read from and written to JSON."""

from __future__ import annotations

from typing import Any

from abliterator.record import Frozen


class DocScore(Frozen):
    """The value of the task's metric on one document, after one of its answer filters."""

    doc_id: int
    filter: str
    doc_hash: str
    prompt_hash: str
    target_hash: str
    value: float
    gold_loglik: float | None = None  # log-likelihood of the gold answer, nats; choices only
    # probability of the likeliest choice among all, where the likeliest is what is scored
    confidence: float | None = None
    empty: bool | None = None  # the answer has no text; generation only
    truncated: bool | None = None  # the answer has as many tokens as it may have; generation only


class Aggregate(Frozen):
    """One score of several tasks, as an lm-eval group has it: the mean of one metric."""

    group: str
    metric: str
    filters: tuple[str, ...] | None = None  # answer filters that have one; None for all
    by_size: bool = True  # documents have equal weights; otherwise tasks do


class TaskScores(Frozen):
    """One task on one checkpoint; `settings` are what two sides must share to be compared."""

    task: str
    metric: str
    n: int
    asked: int | None = None  # documents that were to be scored; None in files of before
    higher_is_better: bool
    scores: tuple[DocScore, ...]
    settings: dict[str, Any]
    aggregates: tuple[Aggregate, ...] = ()  # that include this task, the widest first
