"""Base against edited, paired document by document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from abliterator import statistics
from abliterator.benchmarks._scores import TaskScores
from abliterator.errors import BenchmarkError
from abliterator.record import BenchmarkResult, Estimate


def compare_tasks(
    base: Mapping[str, TaskScores], edited: Mapping[str, TaskScores]
) -> dict[str, BenchmarkResult]:
    """Pair base with edited, document by document: both sides and edited - base, with intervals.

    Keys are task names; a task with several answer filters has one result for each, under
    `task,filter`.

    Raises:
        BenchmarkError: if the two sides hold other tasks, settings, documents or prompts.
    """
    if base.keys() != edited.keys():
        raise BenchmarkError(
            f"Base and edited were measured on different tasks ({', '.join(base) or 'none'} and "
            f"{', '.join(edited) or 'none'}). Run the benchmarks of both again."
        )
    results: dict[str, BenchmarkResult] = {}
    for name, before in base.items():
        results |= _compare_task(before, edited[name])
    return results


def _compare_task(base: TaskScores, edited: TaskScores) -> dict[str, BenchmarkResult]:
    before, after = _identity(base), _identity(edited)
    differing = sorted(
        key for key in before.keys() | after.keys() if before.get(key) != after.get(key)
    )
    if differing:
        seen = "; ".join(f"{key}: {before.get(key)!r} and {after.get(key)!r}" for key in differing)
        raise BenchmarkError(
            f"The benchmark task {base.task!r} was run with different settings on base and edited "
            f"({seen}). Only runs that are alike can be compared; run both again."
        )
    filters = list(dict.fromkeys(score.filter for score in base.scores))
    results = {}
    for name in filters:
        key = base.task if len(filters) == 1 else f"{base.task},{name}"
        results[key] = _result(base, name, _paired(base, edited, name))
    return results


def _identity(scores: TaskScores) -> dict[str, Any]:
    filters = sorted({score.filter for score in scores.scores})
    return {**scores.settings, "task": scores.task, "metric": scores.metric, "filters": filters}


def _paired(base: TaskScores, edited: TaskScores, name: str) -> list[tuple[float, float]]:
    """(base, edited) values of the same documents in order of doc_id."""
    before = {score.doc_id: score for score in base.scores if score.filter == name}
    after = {score.doc_id: score for score in edited.scores if score.filter == name}
    if before.keys() != after.keys():
        lone = min(before.keys() ^ after.keys())
        raise BenchmarkError(
            f"The benchmark task {base.task!r} has {len(before)} scored documents on base and "
            f"{len(after)} on edited; document {lone} is on one side only. Run both again with "
            "the same limit."
        )
    for doc_id, score in before.items():
        for field in ("doc_hash", "prompt_hash", "target_hash"):
            if getattr(score, field) != getattr(after[doc_id], field):
                raise BenchmarkError(
                    f"Document {doc_id} of the benchmark task {base.task!r} has another {field} "
                    "on base than on edited, so the two models were not asked the same. Their "
                    "data, tokenizers or chat templates differ; run both again on the same files."
                )
    return [(before[doc_id].value, after[doc_id].value) for doc_id in sorted(before)]


def _result(base: TaskScores, name: str, pairs: Sequence[tuple[float, float]]) -> BenchmarkResult:
    before, after = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return BenchmarkResult(
        metric=base.metric,
        n=len(pairs),
        base=_estimate(before),
        edited=_estimate(after),
        delta=_as_estimate(statistics.paired_delta(before, after)),
        smallest_detectable=statistics.smallest_detectable(before, after),
        higher_is_better=base.higher_is_better,
        settings={**base.settings, "filter": name},
    )


def _estimate(values: Sequence[float]) -> Estimate:
    """A rate where each document is right or wrong (its interval holds at 0 and 1), else a mean."""
    if all(value in (0.0, 1.0) for value in values):
        return _as_estimate(statistics.rate_interval(int(sum(values)), len(values)))
    return _as_estimate(statistics.mean_interval(values))


def _as_estimate(interval: statistics.Interval | None) -> Estimate:
    if interval is None:
        raise BenchmarkError("A benchmark task has no scored documents. Raise `benchmarks.limit`.")
    return Estimate(**interval._asdict())
