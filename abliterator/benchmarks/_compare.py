"""Compares base with edited, paired by document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from abliterator import statistics
from abliterator.benchmarks._scores import Aggregate, DocScore, TaskScores
from abliterator.errors import BenchmarkError
from abliterator.record import BenchmarkResult, Estimate


class Pair(NamedTuple):
    """The scores of one document on both sides."""

    base: DocScore
    edited: DocScore


def compare_tasks(
    base: Mapping[str, TaskScores], edited: Mapping[str, TaskScores], *, seed: int = 0
) -> dict[str, BenchmarkResult]:
    """Pair base with edited, document by document: both sides and edited - base, with intervals.

    The p-value is McNemar's where each document is right or wrong, else that of a sign-flip test;
    `p_holm` (Holm 1979) holds for all results together.

    Args:
        base: scores by task.
        edited: scores of the same tasks.
        seed: of bootstrap and sign flips.

    Returns:
        Results by task, and by aggregate before the first of its tasks. Where answers are filtered
        in several ways there is one result for each, under `task,filter`.

    Raises:
        BenchmarkError: if the two sides hold other tasks, settings, documents or prompts.
    """
    if base.keys() != edited.keys():
        raise BenchmarkError(
            f"Base and edited were measured on different tasks ({', '.join(base) or 'none'} and "
            f"{', '.join(edited) or 'none'}). Run the benchmarks of both again."
        )
    groups: dict[Aggregate, list[str]] = {}
    for name, scores in base.items():
        _require_alike(scores, edited[name])
        for aggregate in scores.aggregates:
            groups.setdefault(aggregate, []).append(name)
    results: dict[str, BenchmarkResult] = {}
    for name, scores in base.items():
        for aggregate in scores.aggregates:
            members = groups[aggregate]
            if members[0] == name:
                sides = [(base[member], edited[member]) for member in members]
                results |= _compare_aggregate(aggregate, sides, seed=seed)
        for key, answer_filter in _keys(scores.task, _filters(scores)).items():
            pairs = _pairs(scores, edited[name], answer_filter)
            settings = {**scores.settings, "filter": answer_filter}
            results[key] = _result(scores, pairs, settings, asked=scores.asked, seed=seed)
    return _holm_adjusted(results)


def _keys(name: str, filters: Sequence[str]) -> dict[str, str]:
    """The answer filter of every result, by the name of the result."""
    return {
        name if len(filters) == 1 else f"{name},{answer_filter}": answer_filter
        for answer_filter in filters
    }


def _compare_aggregate(
    aggregate: Aggregate, sides: Sequence[tuple[TaskScores, TaskScores]], *, seed: int
) -> dict[str, BenchmarkResult]:
    """Paired results of a group: the documents of its tasks together, each with its weight."""
    filters = dict.fromkeys(name for base, _ in sides for name in _filters(base))
    counted = [name for name in filters if aggregate.filters is None or name in aggregate.filters]
    results = {}
    for key, name in _keys(aggregate.group, counted).items():
        tasks = [_pairs(base, edited, name) for base, edited in sides if name in _filters(base)]
        if not aggregate.by_size:
            tasks = [_equally_weighted(task, tasks) for task in tasks]
        first, *others = (base.settings for base, _ in sides)
        shared = {k: v for k, v in first.items() if all(other.get(k) == v for other in others)}
        settings = {
            **shared,
            "filter": name,
            "tasks": len(tasks),
            "mean_over": "documents" if aggregate.by_size else "tasks",
        }
        asked = [base.asked for base, _ in sides if name in _filters(base)]
        results[key] = _result(
            sides[0][0],
            list(chain(*tasks)),
            settings,
            asked=None if None in asked else sum(filter(None, asked)),
            seed=seed,
        )
    return results


def _equally_weighted(task: Sequence[Pair], tasks: Sequence[Sequence[Pair]]) -> list[Pair]:
    """The pairs of one task, weighted so that the mean over documents is the mean over tasks."""
    weight = sum(map(len, tasks)) / (len(tasks) * len(task))

    def weighted(score: DocScore) -> DocScore:
        gold = None if score.gold_loglik is None else score.gold_loglik * weight
        return score.model_copy(update={"value": score.value * weight, "gold_loglik": gold})

    return [Pair(*map(weighted, pair)) for pair in task]


def _filters(scores: TaskScores) -> list[str]:
    return list(dict.fromkeys(score.filter for score in scores.scores))


def _require_alike(base: TaskScores, edited: TaskScores) -> None:
    before, after = _identity(base), _identity(edited)
    differences = "; ".join(
        f"{key}: {before.get(key)!r} and {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    )
    if differences:
        raise BenchmarkError(
            f"The benchmark task {base.task!r} was run with different settings on base and edited "
            f"({differences}). Only runs that are alike can be compared; run both again."
        )


def _identity(scores: TaskScores) -> dict[str, Any]:
    fields = scores.model_dump(include={"task", "metric", "aggregates"})
    return {**scores.settings, **fields, "filters": sorted(_filters(scores))}


def _pairs(base: TaskScores, edited: TaskScores, name: str) -> list[Pair]:
    """The same documents on both sides, in order of doc_id."""
    before = {score.doc_id: score for score in base.scores if score.filter == name}
    after = {score.doc_id: score for score in edited.scores if score.filter == name}
    if before.keys() != after.keys():
        unpaired = min(before.keys() ^ after.keys())
        raise BenchmarkError(
            f"The benchmark task {base.task!r} has {len(before)} scored documents on base and "
            f"{len(after)} on edited; document {unpaired} is on one side only. Run both again with "
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
    return [Pair(before[doc_id], after[doc_id]) for doc_id in sorted(before)]


def _result(
    task: TaskScores,
    pairs: Sequence[Pair],
    settings: dict[str, Any],
    *,
    asked: int | None,
    seed: int,
) -> BenchmarkResult:
    before, after = [pair.base.value for pair in pairs], [pair.edited.value for pair in pairs]
    return BenchmarkResult(
        metric=task.metric,
        n=len(pairs),
        base=_estimate(before, asked, seed=seed),
        edited=_estimate(after, asked, seed=seed),
        delta=_as_estimate(statistics.paired_delta(before, after, seed=seed), asked),
        smallest_detectable=statistics.smallest_detectable(before, after),
        higher_is_better=task.higher_is_better,
        settings=settings,
        gold_loglik=_gold_shift(pairs, seed=seed),
        **_significance(before, after, seed=seed),
        **_answer_rates(pairs),
    )


def _significance(before: Sequence[float], after: Sequence[float], *, seed: int) -> dict[str, Any]:
    """`p_value`, and the documents that changed where each is right or wrong."""
    if not _right_or_wrong([*before, *after]):
        return {"p_value": statistics.sign_flip_test(before, after, seed=seed)}
    changes = [e - b for b, e in zip(before, after, strict=True)]
    return {
        "p_value": statistics.mcnemar_exact([*map(bool, before)], [*map(bool, after)]),
        "gained": changes.count(1.0),
        "lost": changes.count(-1.0),
    }


def _gold_shift(pairs: Sequence[Pair], *, seed: int) -> Estimate | None:
    """Shift of the gold answer's log-likelihood, which changes before any choice flips."""
    golds = [score.gold_loglik for pair in pairs for score in pair]
    known = [gold for gold in golds if gold is not None]
    if len(known) < len(golds):
        return None
    return _as_estimate(statistics.paired_delta(known[::2], known[1::2], seed=seed))


def _answer_rates(pairs: Sequence[Pair]) -> dict[str, Estimate]:
    """Shares of empty and of cut answers: a score can fall because there is no answer at all."""
    rates = {}
    for flaw in ("empty", "truncated"):
        for side in Pair._fields:
            flags = [getattr(getattr(pair, side), flaw) for pair in pairs]
            if None not in flags:
                rates[f"{flaw}_{side}"] = _as_estimate(
                    statistics.rate_interval(sum(flags), len(flags))
                )
    return rates


def _holm_adjusted(results: Mapping[str, BenchmarkResult]) -> dict[str, BenchmarkResult]:
    """The results with p-values that hold for all of them together."""
    tested = {name: r.p_value for name, r in results.items() if r.p_value is not None}
    adjusted = dict(zip(tested, statistics.holm([*tested.values()]), strict=True))
    return {
        name: result.model_copy(update={"p_holm": adjusted.get(name)})
        for name, result in results.items()
    }


def _right_or_wrong(values: Sequence[float]) -> bool:
    return all(value in (0.0, 1.0) for value in values)


def _estimate(values: Sequence[float], asked: int | None, *, seed: int) -> Estimate:
    """A rate where each document is right or wrong (its interval holds at 0 and 1), else a mean."""
    if _right_or_wrong(values):
        return _as_estimate(statistics.rate_interval(int(sum(values)), len(values)), asked)
    return _as_estimate(statistics.mean_interval(values, seed=seed), asked)


def _as_estimate(interval: statistics.Interval | None, asked: int | None = None) -> Estimate:
    estimate = Estimate.of(interval, asked)
    if estimate is None:
        raise BenchmarkError("A benchmark task has no scored documents. Raise `benchmarks.limit`.")
    return estimate
