"""What one task gave on one checkpoint, document by document; JSON both ways."""

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


class TaskScores(Frozen):
    """One task on one checkpoint; `settings` are what two sides must share to be compared."""

    task: str
    metric: str
    n: int
    higher_is_better: bool
    scores: tuple[DocScore, ...]
    settings: dict[str, Any]
