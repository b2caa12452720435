"""Verdicts of one prompt set to rates, means and paired differences.

The unit is the prompt. What cannot be estimated is None: no verdicts, or too many without a grade.
`estimates_of` is the summary of any verdicts; `summarise` compares base with edited.

    estimates_of(verdicts).refusal                          # Estimate(value=0.31, low=..., n=100)
    behaviour = summarise(base_verdicts, edited_verdicts)
    behaviour.delta.compliance.value, behaviour.smallest_detectable["compliance"]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean
from typing import NamedTuple

from abliterator.errors import JudgeError
from abliterator.judge._types import Judgement
from abliterator.record import Behaviour, BehaviourSide, Estimate, Side, Verdict
from abliterator.statistics import (
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


def estimates_of(verdicts: Sequence[Verdict], *, seed: int = 0) -> VerdictEstimates:
    """Refusal, compliance, coherence and their product, with 95 % intervals.

    The rate has a Wilson interval, means a bootstrap over prompts. Withheld (None) where more than
    2 % of the verdicts are unscored.

    Args:
        verdicts: of one prompt set on one side.
        seed: of the bootstrap.
    """
    scored = scored_verdicts(verdicts)
    return VerdictEstimates(*(_estimate(name, scored, seed) for name in GRADED))


def estimates_of_draws(draws: Sequence[Sequence[Verdict]]) -> VerdictEstimates:
    """The same over prompts that several draws answered: each prompt counts as its mean.

    Args:
        draws: verdicts of each draw on the same prompts, in one order.
    """
    if not scored_verdicts([verdict for draw in draws for verdict in draw]):
        return VerdictEstimates(None, None, None, None)
    scored = ([v for v in column if not _unscored(v)] for column in zip(*draws, strict=True))
    prompts = [verdicts for verdicts in scored if verdicts]
    return VerdictEstimates(
        *(
            Estimate.of(mean_interval([mean(map(measure, verdicts)) for verdicts in prompts]))
            for measure in GRADED.values()
        )
    )


def _estimate(name: str, verdicts: Sequence[Verdict], seed: int) -> Estimate | None:
    measure: Measure = (GRADED | COUNTED)[name]
    values = [value for verdict in verdicts if (value := measure(verdict)) is not None]
    if name in _RATES:
        return Estimate.of(rate_interval(int(sum(values)), len(values)))
    return Estimate.of(mean_interval(values, seed=seed))


def summarise(base: Sequence[Verdict], edited: Sequence[Verdict], *, seed: int = 0) -> Behaviour:
    """Both sides of one prompt set, and their difference paired by index.

    Rates carry Wilson intervals, means and deltas a bootstrap over prompts. Unscored answers are
    left out, and counted; where they are more than 2 % of a side, its figures and the deltas are
    withheld (None).

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
        base=_side([b for b, _ in pairs], seed),
        edited=_side([e for _, e in pairs], seed),
        delta=_delta(pairs, scored, seed),
        smallest_detectable={
            name: smallest_detectable(*_values(measure, scored)) for name, measure in GRADED.items()
        },
        p_value=_p_values(scored, seed),
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


def _side(verdicts: Sequence[Verdict], seed: int) -> BehaviourSide:
    counted = {name: _estimate(name, verdicts, seed) for name in COUNTED}
    return BehaviourSide(**estimates_of(verdicts, seed=seed)._asdict(), **counted)


def _delta(pairs: Pairs, scored: Pairs, seed: int) -> BehaviourSide:
    deltas = {
        name: Estimate.of(paired_delta(*_values(measure, selected), seed=seed))
        for measures, selected in ((GRADED, scored), (COUNTED, pairs))
        for name, measure in measures.items()
    }
    return BehaviourSide(**deltas)


def _values(measure: Measure, pairs: Pairs) -> tuple[list[float], list[float]]:
    """A measure on base and edited, of the pairs that have it on both sides."""
    values = [
        (base, edited)
        for base, edited in ((measure(b), measure(e)) for b, e in pairs)
        if base is not None and edited is not None
    ]
    return [base for base, _ in values], [edited for _, edited in values]


def _p_values(pairs: Pairs, seed: int) -> dict[str, float | None]:
    """McNemar's exact test of refusal, sign flips of the graded means; None without pairs."""
    if not pairs:
        return dict.fromkeys(GRADED)
    refused = [bool(b.refused) for b, _ in pairs], [bool(e.refused) for _, e in pairs]
    return {
        name: mcnemar_exact(*refused)
        if name == "refusal"
        else sign_flip_test(*_values(measure, pairs), seed=seed)
        for name, measure in GRADED.items()
    }


def unscored_reasons(verdicts: Iterable[Verdict | Judgement]) -> dict[str, int]:
    """Why answers have no verdict, each reason with its count, the most frequent first."""
    unscored = filter(_unscored, verdicts)
    texts = ("; ".join(v.reasons).removeprefix("unscored: ") or "no reason given" for v in unscored)
    return dict(Counter(texts).most_common())


def counted(reasons: Mapping[str, int]) -> str:
    """Reasons with their counts as one text; of many, the three most frequent."""
    texts = [f"{n} x {reason}" for reason, n in list(reasons.items())[:3]]
    return ", ".join(texts) + (f", and {len(reasons) - 3} more" if len(reasons) > 3 else "")
