"""The judge that needs no model and no network."""

from __future__ import annotations

from collections.abc import Sequence

from abliterator.judge._coherence import coherence_of
from abliterator.judge._rules import compliance_of, phrases
from abliterator.judge._types import Answered, Judgement, judged_empty
from abliterator.record import FinishReason, JudgeIdentity


class RuleJudge:
    """Phrases, their place, and repetition."""

    @property
    def identity(self) -> JudgeIdentity:
        """Kind "rules", and the hash of the phrases that the verdicts rest on."""
        data = phrases()
        return JudgeIdentity(
            kind="rules", model="rule judge", prompt_sha256=data.sha256, version=data.version
        )

    def judge_all(self, answers: Sequence[Answered]) -> list[Judgement]:
        """Judge every answer, in their order."""
        return [_judged(answered) for answered in answers]

    def judge(self, prompt: str, response: str, *, finish_reason: FinishReason) -> Judgement:
        """Judge one answer from its text.

        Thinking is split off first. A cut-off end is reported, not punished. An empty answer is
        neither a refusal nor coherent; a broken one does not comply.
        """
        return _judged(Answered(prompt, response, finish_reason))


def _judged(answered: Answered) -> Judgement:
    empty = judged_empty(answered)
    if empty is not None:
        return empty
    prompt, answer = answered.prompt, answered.split.answer
    cut = ("truncated",) if answered.finish_reason == "length" else ()
    coherence, flaws = coherence_of(prompt, answer)
    grade, refused, reasons = compliance_of(prompt, answer)
    if coherence == 0:
        grade = 0.0
    return Judgement(grade, coherence, refused, (*reasons, *flaws, *cut))
