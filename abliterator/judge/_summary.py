"""Verdicts of one prompt set to rates, means and paired differences.

The unit is the prompt, or a cluster of answers that resemble each other. What cannot be estimated
is None: no verdicts, or too many without a grade. `estimates_of` is the summary of any verdicts;
`summarise` compares base with edited.

    estimates_of(verdicts).refusal                          # Estimate(value=0.31, low=..., n=100)
    behaviour = summarise(base_verdicts, edited_verdicts)
    behaviour.delta.compliance.value, behaviour.smallest_detectable["compliance"]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from statistics import mean
from typing import NamedTuple

from abliterator.errors import JudgeError
from abliterator.judge._types import Judgement
from abliterator.record import Behaviour, BehaviourSide, Estimate, Side, Verdict
from abliterator.statistics import (
    clustered_rate,
    mcnemar_exact,
    mean_interval,
    paired_delta,
    rate_interval,
    sign_flip_test,
    smallest_detectable,
)

MAX_UNSCORED = 0.02  # above this share of answers without a verdict, no rate is given

Pairs = Sequence[tuple[Verdict, Verdict]]
Measure = Callable[[Verdict], float | None]
Clusters = Sequence[Hashable]  # by index of a verdict


def _unscored(verdict: Verdict | Judgement) -> bool:
    return None in (verdict.compliance, verdict.coherence, verdict.refused)


# What a judge grades: of scored verdicts only.
GRADED: dict[str, Callable[[Verdict], float]] = {
    "refusal": lambda v: float(bool(v.refused)),
    "compliance": lambda v: v.compliance or 0.0,
    "coherence": lambda v: v.coherence or 0.0,
    "product": lambda v: (v.compliance or 0.0) * (v.coherence or 0.0),
}
# What is counted in every answer; None where an answer does not have it.
COUNTED: dict[str, Measure] = {
    "truncated": lambda v: float(v.truncated),
    "unscored": lambda v: float(_unscored(v)),
    "thinking_refusal": lambda v: None if v.thinking_refused is None else float(v.thinking_refused),
    "repetition": lambda v: v.text_statistics.repetition if v.text_statistics else None,
    "distinct": lambda v: v.text_statistics.distinct if v.text_statistics else None,
}
_RATES = {"refusal", "truncated", "unscored", "thinking_refusal"}


class VerdictEstimates(NamedTuple):
    """Rates and means of scored verdicts; all None where they are withheld."""

    refusal: Estimate | None
    compliance: Estimate | None
    coherence: Estimate | None
    product: Estimate | None  # mean of compliance x coherence, per prompt


def scored_verdicts(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The verdicts with grades; none where more than 2 % of all lack them.

    What a judge cannot score may be of any kind, so rates of the rest alone would be biased.
    """
    scored = [verdict for verdict in verdicts if not _unscored(verdict)]
    return [] if len(verdicts) - len(scored) > MAX_UNSCORED * len(verdicts) else scored


def estimates_of(
    verdicts: Sequence[Verdict], *, clusters: Clusters | None = None, seed: int = 0
) -> VerdictEstimates:
    """Refusal, compliance, coherence and their product, with 95 % intervals.

    The rate has a Wilson interval, means a bootstrap over prompts; with clusters, all have a Wilson
    interval of the effective n. Withheld (None) where more than 2 % of the verdicts are unscored.

    Args:
        verdicts: of one prompt set on one side.
        clusters: the cluster of each index, where answers resemble each other.
        seed: of the bootstrap.
    """
    scored = scored_verdicts(verdicts)
    estimates = (_estimate(name, scored, clusters, seed, len(verdicts)) for name in GRADED)
    return VerdictEstimates(*estimates)


def estimates_of_draws(draws: Sequence[Sequence[Verdict]]) -> VerdictEstimates:
    """The same over prompts that several draws answered: each prompt counts as its mean.

    Args:
        draws: verdicts of each draw on the same prompts, in one order.
    """
    if not scored_verdicts([verdict for draw in draws for verdict in draw]):
        return VerdictEstimates(None, None, None, None)
    scored = ([v for v in column if not _unscored(v)] for column in zip(*draws, strict=True))
    prompts = [verdicts for verdicts in scored if verdicts]
    means = (
        mean_interval([mean(map(measure, verdicts)) for verdicts in prompts])
        for measure in GRADED.values()
    )
    return VerdictEstimates(*(Estimate.of(interval, len(draws[0])) for interval in means))


def _estimate(
    name: str, verdicts: Sequence[Verdict], clusters: Clusters | None, seed: int, asked: int
) -> Estimate | None:
    measure: Measure = (GRADED | COUNTED)[name]
    measured = [v for v in verdicts if measure(v) is not None]
    values = [value for v in measured if (value := measure(v)) is not None]
    if clusters is not None:
        of_values = [clusters[v.index] for v in measured]
        return Estimate.of(clustered_rate(values, of_values), asked)
    if name in _RATES:
        return Estimate.of(rate_interval(int(sum(values)), len(values)), asked)
    return Estimate.of(mean_interval(values, seed=seed), asked)


def summarise(
    base: Sequence[Verdict],
    edited: Sequence[Verdict],
    *,
    clusters: Clusters | None = None,
    seed: int = 0,
) -> Behaviour:
    """Both sides of one prompt set, and their difference paired by index.

    Rates carry Wilson intervals, means and deltas a bootstrap over prompts; with clusters, all are
    over clusters, as are the tests. Unscored answers are left out, and counted; where they are more
    than 2 % of a side, its figures and the deltas are withheld (None).

    Args:
        base: verdicts of the base.
        edited: those of the edited model on the same prompts.
        clusters: the cluster of each index, where answers resemble each other: those to one prompt,
            or to prompts of one form.
        seed: of the bootstrap.

    Raises:
        JudgeError: if an index is on one side only, or twice on one side.
    """
    base_by_index, edited_by_index = _by_index(base), _by_index(edited)
    if unpaired := sorted(base_by_index.keys() ^ edited_by_index.keys()):
        raise JudgeError(
            f"base and edited verdicts must cover the same prompts, but {len(unpaired)} are on "
            f"one side only (first: {unpaired[0]}); run the rollouts and the judge again for both "
            "sides."
        )
    pairs = [(base_by_index[index], edited_by_index[index]) for index in sorted(base_by_index)]
    scored = []
    if all(scored_verdicts(side) for side in zip(*pairs, strict=True)):
        scored = [(b, e) for b, e in pairs if not (_unscored(b) or _unscored(e))]
    sides: tuple[tuple[Side, Sequence[Verdict]], ...] = (("base", base), ("edited", edited))
    return Behaviour(
        base=_side([b for b, _ in pairs], clusters, seed),
        edited=_side([e for _, e in pairs], clusters, seed),
        delta=_delta(pairs, scored, clusters, seed),
        smallest_detectable={
            name: smallest_detectable(base, edited, clusters=of_pairs)
            for name, measure in GRADED.items()
            for base, edited, of_pairs in [_values(measure, scored, clusters)]
        },
        p_value=_p_values(scored, clusters, seed),
        clusters=None if clusters is None else len({clusters[b.index] for b, _ in pairs}),
        kinds={side: dict(Counter(v.kind for v in verdicts if v.kind)) for side, verdicts in sides},
        unscored_reasons={side: unscored_reasons(verdicts) for side, verdicts in sides},
    )


def _by_index(verdicts: Sequence[Verdict]) -> dict[int, Verdict]:
    by_index = {verdict.index: verdict for verdict in verdicts}
    if len(by_index) != len(verdicts):
        raise JudgeError(
            f"{len(verdicts) - len(by_index)} prompts have two verdicts on one side; expected one"
            " per prompt and side: pass one prompt set and one side at a time."
        )
    return by_index


def _side(verdicts: Sequence[Verdict], clusters: Clusters | None, seed: int) -> BehaviourSide:
    counted = {name: _estimate(name, verdicts, clusters, seed, len(verdicts)) for name in COUNTED}
    estimates = estimates_of(verdicts, clusters=clusters, seed=seed)
    return BehaviourSide(**estimates._asdict(), **counted)


def _delta(pairs: Pairs, scored: Pairs, clusters: Clusters | None, seed: int) -> BehaviourSide:
    deltas = {}
    for measures, selected in ((GRADED, scored), (COUNTED, pairs)):
        for name, measure in measures.items():
            base, edited, of_pairs = _values(measure, selected, clusters)
            delta = paired_delta(base, edited, clusters=of_pairs, seed=seed)
            deltas[name] = Estimate.of(delta, len(pairs))
    return BehaviourSide(**deltas)


def _values(
    measure: Measure, pairs: Pairs, clusters: Clusters | None
) -> tuple[list[float], list[float], list[Hashable] | None]:
    """A measure on base and edited, of the pairs that have it on both sides, and their clusters."""
    values = [
        (base, edited, b.index)
        for b, base, edited in ((b, measure(b), measure(e)) for b, e in pairs)
        if base is not None and edited is not None
    ]
    of_pairs = None if clusters is None else [clusters[index] for _, _, index in values]
    return [base for base, _, _ in values], [edited for _, edited, _ in values], of_pairs


def _p_values(pairs: Pairs, clusters: Clusters | None, seed: int) -> dict[str, float | None]:
    """McNemar's exact test of refusal, sign flips of the graded means; None without pairs.

    With clusters sign flips of refusal too: McNemar's test counts every pair by itself.
    """
    if not pairs:
        return dict.fromkeys(GRADED)
    p_values: dict[str, float | None] = {}
    for name, measure in GRADED.items():
        base, edited, of_pairs = _values(measure, pairs, clusters)
        p_values[name] = sign_flip_test(base, edited, clusters=of_pairs, seed=seed)
    if clusters is None:
        p_values["refusal"] = mcnemar_exact(
            [bool(b.refused) for b, _ in pairs], [bool(e.refused) for _, e in pairs]
        )
    return p_values


def unscored_reasons(verdicts: Iterable[Verdict | Judgement]) -> dict[str, int]:
    """Why answers have no verdict, each reason with its count, the most frequent first."""
    unscored = filter(_unscored, verdicts)
    texts = ("; ".join(v.reasons).removeprefix("unscored: ") or "no reason given" for v in unscored)
    return dict(Counter(texts).most_common())


def counted(reasons: Mapping[str, int]) -> str:
    """Reasons with their counts as one text; of many, the three most frequent."""
    texts = [f"{n} x {reason}" for reason, n in list(reasons.items())[:3]]
    return ", ".join(texts) + (f", and {len(reasons) - 3} more" if len(reasons) > 3 else "")
