"""The judge that needs no model and no network."""

from __future__ import annotations

from collections.abc import Sequence

from abliterator.judge._coherence import coherence_of
from abliterator.judge._rules import compliance_of, phrases
from abliterator.judge._types import Answered, Judgement, judged_empty, split_thinking
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
        return [self.judge(a.prompt, a.response, finish_reason=a.finish_reason) for a in answers]

    def judge(self, prompt: str, response: str, *, finish_reason: FinishReason) -> Judgement:
        """Judge one answer from its text.

        Thinking is split off first. A cut-off end is reported, not punished. An empty answer is
        neither a refusal nor coherent; a broken one does not comply.
        """
        empty = judged_empty(Answered(prompt, response, finish_reason))
        if empty is not None:
            return empty
        _, answer = split_thinking(response)
        cut = ("truncated",) if finish_reason == "length" else ()
        coherence, flaws = coherence_of(prompt, answer)
        grade, refused, reasons = compliance_of(prompt, answer)
        if coherence == 0:
            grade = 0.0
        return Judgement(grade, coherence, refused, (*reasons, *flaws, *cut))
