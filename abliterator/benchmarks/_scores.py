"""The scores of one task on one checkpoint, by document; read from and written to JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from abliterator.errors import FileError
from abliterator.files import digest_of, portable_name, read_text, write_text_atomic
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
    text: str | None = None  # what was said; conversations only


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


def keep_scores(folder: Path, key: str, scores: TaskScores) -> None:
    """Writes the scores of a task in `folder`, for `kept_scores`.

    Args:
        folder: of the side.
        key: digest of all that the scores depend on.
        scores: of one task.
    """
    plain = _sealed(key, scores.model_dump(mode="json"))
    path = folder / portable_name(scores.task, ".json")
    write_text_atomic(path, json.dumps(plain, indent=1) + "\n")


def kept_scores(folder: Path, task: str, key: str) -> TaskScores | None:
    """Scores stored under the key; None where there are none, or their digest does not match."""
    try:
        plain = json.loads(read_text(folder / portable_name(task, ".json")))
        if plain != _sealed(key, plain["scores"]):
            return None
        return TaskScores.model_validate(plain["scores"])
    except (FileError, ValueError, TypeError, KeyError):
        return None


def _sealed(key: str, scores: Any) -> dict[str, Any]:
    """The contents of a file of scores: the scores, their key, and a digest of both."""
    return {"key": key, "sha256": digest_of([key, scores]), "scores": scores}
