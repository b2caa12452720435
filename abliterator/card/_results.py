"""The card's part on measurements of base and edited model, and on what was not measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from abliterator.card._markdown import (
    Markdown,
    Row,
    delta,
    escape,
    estimate,
    interval,
    listed,
    number,
    probability,
    row,
    settings,
    without_paths,
)
from abliterator.record import Behaviour, BenchmarkResult, Divergence, JudgeIdentity, RunRecord

SETS = {
    "target": "Target prompts (the behaviour that was to go)",
    "neutral": "Neutral prompts (what was to stay)",
    "over_refusal": "Over-refusal prompts (harmless, but they look like target prompts)",
}
_JUDGED = {
    "refusal": "Refusal",
    "compliance": "Compliance (0, 0.5 or 1)",
    "coherence": "Coherence (0, 0.5 or 1)",
    "product": "Compliance x coherence",
    "truncated": "Cut at the token limit",
    "unscored": "Unscored",
}
_COUNTED = {
    "repetition": "Share that repeats itself (counted, not judged)",
    "distinct": "Word pairs that are not repeats (counted, not judged)",
}
_DIVERGENCES = {
    "kl_first_token": "KL(base, edited) of the first answer token, nats",
    "kl": "KL(base, edited) per answer token, nats",
    "top1_agreement": "Same most likely next token",
}


class PromptSetResults(NamedTuple):
    """One prompt set's part of the card: a table, and paragraphs below it."""

    heading: Markdown
    rows: list[Row]
    notes: list[str]


def result_variables(record: RunRecord) -> dict[str, object]:
    """Variables of the template for what was measured, and what was not."""
    scores = record.benchmarks
    return {
        "judged": any(record.behaviour.values()),
        "judged_by": [row("Judged by", _judge_description(record.judge))],
        "measure": _measure_heading(record.judge),
        "prompt_sets": list(_prompt_sets(record.behaviour)),
        "quoted": [(quotation.source, quotation.says) for quotation in record.quoted],
        "divergence": list(_divergence_rows(record.divergence)),
        "scores": [_score_row(task, result) for task, result in scores.items()],
        "delta_tests": [_delta_test_row(task, result) for task, result in scores.items()],
        "generated": _generated_rows(scores),
        "task_settings": _setting_rows(scores),
        "gaps": list(_gaps(record)),
    }


def _judge_description(judge: JudgeIdentity | None) -> Markdown:
    """One phrase: the judge, and its calibration."""
    if judge is None:
        return Markdown("a judge that was not recorded")
    if judge.kind == "rules":
        description = "a rule judge: phrase and repetition rules, no model"
    else:
        description = f"the judge {escape(judge.kind)}, model {escape(judge.model or 'not stated')}"
    description += f"; version {escape(judge.version)}"
    if judge.served_model is not None:
        description += f"; the server called itself {escape(judge.served_model)}"
    if judge.fingerprints:
        description += f" ({listed(judge.fingerprints)})"
    if judge.prompt_sha256 is not None:
        description += f"; sha256 of its instructions {escape(judge.prompt_sha256)}"
    for other, rate in judge.disagreement.items():
        description += f"; it disagrees with {escape(other)} on {estimate(rate)}"
    if judge.calibration is None:
        return Markdown(f"{description}; uncalibrated (never measured against human labels)")
    figures = settings(judge.calibration.model_dump(exclude_none=True))
    return Markdown(f"{description}; against human labels: {figures}")


def _measure_heading(judge: JudgeIdentity | None) -> Markdown:
    """First heading of a table of verdicts: it names the judge."""
    if judge is None:
        return Markdown("Measure (judge not recorded)")
    name = "rule judge" if judge.kind == "rules" else f"judge {escape(judge.kind)}"
    return Markdown(f"Measure ({name})")


def _prompt_sets(behaviour: Mapping[str, Behaviour | None]) -> Iterator[PromptSetResults]:
    """Results of the three usual prompt sets, then of any others by name."""
    headings = {name: Markdown(label) for name, label in SETS.items()}
    headings |= {name: escape(name) for name in sorted(behaviour.keys() - SETS.keys())}
    for name, heading in headings.items():
        results = behaviour.get(name)
        if results is None:
            yield PromptSetResults(heading, [], [])
        else:
            yield PromptSetResults(heading, list(_measures(results)), list(_notes(results)))


def _measures(results: Behaviour) -> Iterator[Row]:
    for key, label in {**_JUDGED, **_COUNTED}.items():
        base, edited, change = (
            getattr(side, key) for side in (results.base, results.edited, results.delta)
        )
        if key in _COUNTED and base is None:
            continue
        detectable = results.smallest_detectable.get(key) if key in _JUDGED else None
        note = "" if detectable is None else f"; {number(detectable)} detectable"
        yield row(label, estimate(base), estimate(edited), Markdown(f"{delta(change)}{note}"))


def _notes(results: Behaviour) -> Iterator[str]:
    if results.kinds:
        base, edited = (settings(results.kinds.get(side, {})) for side in ("base", "edited"))
        yield f"Verdicts of base: {base}. Of edited: {edited}."
    for side, reasons in results.unscored_reasons.items():
        if reasons:
            yield f"Unscored of {escape(side)}, by reason: {settings(reasons)}."
    if results.smallest_detectable:
        yield (
            "Detectable is the smallest true delta that this n would have shown, with 80 % power "
            "at the 5 % level."
        )


def _divergence_rows(divergence: Divergence | None) -> Iterator[Row]:
    """KL, agreement and perplexities; no row where nothing was measured."""
    if divergence is None:
        return
    for key, label in _DIVERGENCES.items():
        yield row(label, estimate(getattr(divergence, key)))
    yield row("Perplexity of the base", number(divergence.perplexity_base, ",.2f"))
    yield row("Perplexity of the edited model", number(divergence.perplexity_edited, ",.2f"))


def _score_row(task: str, result: BenchmarkResult) -> Row:
    """Scores of base and edited, and their paired delta."""
    lower = "" if result.higher_is_better else " (lower is better)"
    metric = Markdown(f"{escape(result.metric)}{lower}")
    scores = interval(result.base), interval(result.edited), interval(result.delta, "+.3f")
    return (task, metric, result.n, *scores)


def _delta_test_row(task: str, result: BenchmarkResult) -> Row:
    """Statistics of the delta: detectable size, changed documents, p, gold log-likelihood."""
    detectable = result.smallest_detectable
    return (
        task,
        Markdown("Not known") if detectable is None else number(detectable),
        Markdown("n/a" if result.gained is None else f"{result.gained}, {result.lost}"),
        probability(result.p_value),
        probability(result.p_holm),
        interval(result.gold_loglik, "+.3f"),
    )


def _generated_rows(results: Mapping[str, BenchmarkResult]) -> Iterator[Row]:
    """Shares of empty and of cut answers, of tasks whose answers are generated."""
    for task, result in results.items():
        if result.empty_base is not None:
            empty = interval(result.empty_base), interval(result.empty_edited)
            yield (task, *empty, *map(interval, (result.truncated_base, result.truncated_edited)))


def _setting_rows(results: Mapping[str, BenchmarkResult]) -> Iterator[Row]:
    """Tasks and their settings, one row for the tasks that share them."""
    shared: dict[str, list[str]] = {}
    for task, result in results.items():
        if result.settings:
            shared.setdefault(settings(without_paths(result.settings)), []).append(task)
    for text, tasks in shared.items():
        yield listed(tasks), Markdown(text)


def _gaps(record: RunRecord) -> Iterator[Markdown]:
    """Measurements that are missing in the record, as sentences."""
    for name, label in SETS.items():
        if record.behaviour.get(name) is None:
            yield Markdown(f"Behaviour on {label[0].lower()}{label[1:]}.")
    if record.judge is not None and record.judge.calibration is None:
        yield Markdown("How far this judge agrees with people.")
    divergence = record.divergence or Divergence()
    for name, label in _DIVERGENCES.items():
        if getattr(divergence, name) is None:
            yield Markdown(f"{label}.")
    if divergence.perplexity_edited is None:
        yield Markdown("Perplexity.")
    if not record.benchmarks:
        yield Markdown("Benchmarks.")
    if record.edit.max_leak is None:
        yield Markdown("The leak: what the edited matrices still write along the directions.")
