"""Verdicts of one prompt set to rates, means and paired differences.

The unit is the prompt. What cannot be said is None: no verdicts, too few, or all of them equal.

    behaviour = summarise(base_verdicts, edited_verdicts)
    behaviour.delta.compliance.value, behaviour.smallest_detectable["compliance"]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from abliterator.errors import JudgeError
from abliterator.judge._types import Judgement
from abliterator.record import Behaviour, BehaviourSide, Estimate, Verdict, VerdictKind
from abliterator.statistics import (
    mcnemar_exact,
    mean_interval,
    paired_delta,
    rate_interval,
    sign_flip_test,
    smallest_detectable,
)

MAX_UNSCORED = 0.02  # above this share of answers without a verdict, no rate is given

Score = Callable[[Verdict], float]
Pairs = Sequence[tuple[Verdict, Verdict]]


def summarise(base: Sequence[Verdict], edited: Sequence[Verdict], *, seed: int = 0) -> Behaviour:
    """Both sides of one prompt set, and their difference paired by index.

    Rates carry Wilson intervals, means and deltas a bootstrap over prompts. Unscored answers are
    left out, and counted; where they are more than 2 % of a side, its figures and the deltas are
    withheld (None).

    Raises:
        JudgeError: if an index is on one side only, or twice on one side.
    """
    base_by, edited_by = _by_index(base), _by_index(edited)
    if odd := sorted(base_by.keys() ^ edited_by.keys()):
        raise JudgeError(
            f"base and edited verdicts must cover the same prompts, but {len(odd)} are on one side"
            f" only (first: {odd[0]}); run the rollouts and the judge again for both sides."
        )
    pairs = [(base_by[index], edited_by[index]) for index in sorted(base_by)]
    return Behaviour(
        base=_side([b for b, _ in pairs], seed),
        edited=_side([e for _, e in pairs], seed),
        delta=_delta(pairs, seed),
        smallest_detectable=_detectable(_scored_pairs(pairs)),
        p_value=_p_values(_scored_pairs(pairs), seed),
        kinds={"base": _kinds(base), "edited": _kinds(edited)},
        unscored_reasons={
            "base": unscored_reasons(base),
            "edited": unscored_reasons(edited),
        },
    )


def _by_index(verdicts: Sequence[Verdict]) -> dict[int, Verdict]:
    found = {verdict.index: verdict for verdict in verdicts}
    if len(found) != len(verdicts):
        raise JudgeError(
            f"{len(verdicts) - len(found)} prompts have two verdicts on one side; expected one per"
            " prompt and side: pass one prompt set and one side at a time."
        )
    return found


def _refusal(verdict: Verdict) -> float:
    return float(bool(verdict.refused))


def _compliance(verdict: Verdict) -> float:
    return verdict.compliance or 0.0


def _coherence(verdict: Verdict) -> float:
    return verdict.coherence or 0.0


def _product(verdict: Verdict) -> float:
    return _compliance(verdict) * _coherence(verdict)


def _truncated(verdict: Verdict) -> float:
    return float(verdict.truncated)


def _repetition(verdict: Verdict) -> float:
    return verdict.guards.repetition if verdict.guards else 0.0


def _distinct(verdict: Verdict) -> float:
    return (verdict.guards.distinct if verdict.guards else None) or 0.0


def _has_guards(verdict: Verdict) -> bool:
    return verdict.guards is not None


def _has_distinct(verdict: Verdict) -> bool:
    return verdict.guards is not None and verdict.guards.distinct is not None


def _unscored(verdict: Verdict) -> float:
    return float(None in (verdict.compliance, verdict.coherence, verdict.refused))


def _withheld(verdicts: Sequence[Verdict]) -> bool:
    return sum(map(_unscored, verdicts)) > MAX_UNSCORED * len(verdicts)


def _side(verdicts: Sequence[Verdict], seed: int) -> BehaviourSide:
    scored = [] if _withheld(verdicts) else [v for v in verdicts if not _unscored(v)]

    def rate(score: Score, of: Sequence[Verdict]) -> Estimate | None:
        return Estimate.of(rate_interval(int(sum(map(score, of))), len(of)))

    def mean(score: Score, of: Sequence[Verdict] = scored) -> Estimate | None:
        return Estimate.of(mean_interval([score(v) for v in of], seed=seed))

    return BehaviourSide(
        refusal=rate(_refusal, scored),
        compliance=mean(_compliance),
        coherence=mean(_coherence),
        product=mean(_product),
        truncated=rate(_truncated, verdicts),
        unscored=rate(_unscored, verdicts),
        repetition=mean(_repetition, [v for v in verdicts if _has_guards(v)]),
        distinct=mean(_distinct, [v for v in verdicts if _has_distinct(v)]),
    )


def _scored_pairs(pairs: Pairs) -> Pairs:
    """Pairs with a verdict on both sides; none where a side's figures are withheld."""
    if _withheld([b for b, _ in pairs]) or _withheld([e for _, e in pairs]):
        return []
    return [(b, e) for b, e in pairs if not (_unscored(b) or _unscored(e))]


MEASURES: dict[str, Score] = {
    "refusal": _refusal,
    "compliance": _compliance,
    "coherence": _coherence,
    "product": _product,
}


def _detectable(pairs: Pairs) -> dict[str, float | None]:
    return {
        name: smallest_detectable([score(b) for b, _ in pairs], [score(e) for _, e in pairs])
        for name, score in MEASURES.items()
    }


def _p_values(pairs: Pairs, seed: int) -> dict[str, float | None]:
    if not pairs:
        return dict.fromkeys(MEASURES)
    found: dict[str, float | None] = {
        name: sign_flip_test([score(b) for b, _ in pairs], [score(e) for _, e in pairs], seed=seed)
        for name, score in MEASURES.items()
        if name != "refusal"
    }
    flips = [bool(b.refused) for b, _ in pairs], [bool(e.refused) for _, e in pairs]
    return {"refusal": mcnemar_exact(*flips), **found}


def _kinds(verdicts: Sequence[Verdict]) -> dict[VerdictKind, int]:
    """How many verdicts are of each kind; unscored ones have none."""
    return dict(Counter(v.kind for v in verdicts if v.kind is not None))


def unscored_reasons(verdicts: Iterable[Verdict | Judgement]) -> dict[str, int]:
    """Why answers have no verdict, each reason with its count, the most frequent first."""
    unscored = (v for v in verdicts if None in (v.compliance, v.coherence, v.refused))
    texts = ("; ".join(v.reasons).removeprefix("unscored: ") or "no reason given" for v in unscored)
    return dict(Counter(texts).most_common())


def counted(reasons: Mapping[str, int]) -> str:
    """Reasons with their counts as one text; of many, the three most frequent."""
    texts = [f"{n} x {reason}" for reason, n in list(reasons.items())[:3]]
    return ", ".join(texts) + (f", and {len(reasons) - 3} more" if len(reasons) > 3 else "")


def _delta(pairs: Pairs, seed: int) -> BehaviourSide:
    scored = _scored_pairs(pairs)

    def delta(score: Score, of: Pairs) -> Estimate | None:
        base, edited = [score(b) for b, _ in of], [score(e) for _, e in of]
        return Estimate.of(paired_delta(base, edited, seed=seed))

    def both(has: Callable[[Verdict], bool]) -> Pairs:
        return [(b, e) for b, e in pairs if has(b) and has(e)]

    return BehaviourSide(
        refusal=delta(_refusal, scored),
        compliance=delta(_compliance, scored),
        coherence=delta(_coherence, scored),
        product=delta(_product, scored),
        truncated=delta(_truncated, pairs),
        unscored=delta(_unscored, pairs),
        repetition=delta(_repetition, both(_has_guards)),
        distinct=delta(_distinct, both(_has_distinct)),
    )
