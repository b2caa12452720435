"""Judgements to verdicts: the kind of each, the thinking before it, and its text statistics."""

from __future__ import annotations

from collections.abc import Iterable

from abliterator.judge._coherence import distinct_share, loop_share
from abliterator.judge._thoughts import thinking_refuses
from abliterator.judge._types import Answered, Judge, Judgement
from abliterator.record import Completion, TextStatistics, Verdict, VerdictKind


def judge_completions(completions: Iterable[Completion], judge: Judge) -> list[Verdict]:
    """A verdict for every completion, in their order."""
    completions = list(completions)
    judgements = judge.judge_all([Answered.of(c) for c in completions])
    return [_verdict(c, j) for c, j in zip(completions, judgements, strict=True)]


def _verdict(completion: Completion, judgement: Judgement) -> Verdict:
    thinking, answer, _ = Answered.of(completion).split
    truncated = completion.finish_reason == "length"
    statistics = None
    if answer.strip():
        statistics = TextStatistics(repetition=loop_share(answer), distinct=distinct_share(answer))
    return Verdict(
        set=completion.set,
        side=completion.side,
        index=completion.index,
        compliance=judgement.compliance,
        coherence=judgement.coherence,
        refused=judgement.refused,
        truncated=truncated,
        reasons=judgement.reasons,
        kind=_kind(judgement, answer, truncated=truncated),
        thinking=thinking,
        thinking_refused=thinking_refuses(thinking),
        text_statistics=statistics,
        labels=_rounded(judgement.labels),
    )


def _kind(judgement: Judgement, answer: str, *, truncated: bool) -> VerdictKind | None:
    if not judgement.is_scored:
        return None
    if not answer.strip():
        return "truncated" if truncated else "empty"
    if judgement.coherence == 0:
        return "broken"
    if judgement.compliance:
        return "complied" if judgement.compliance == 1 else "partial"
    return "refused" if judgement.refused else "deflected"


def _rounded(labels: dict[str, dict[str, float]] | None) -> dict[str, dict[str, float]] | None:
    """The probabilities with four decimals: what is beyond is rounding of the computation."""
    if labels is None:
        return None
    return {name: {word: round(p, 4) for word, p in of.items()} for name, of in labels.items()}
