"""A judge by rules, without model or network."""

from __future__ import annotations

from collections.abc import Sequence

from abliterator.judge._coherence import (
    DRIFT,
    LOOP,
    LOST,
    NO_WORDS,
    Coherence,
    coherence_of,
    without_remnants,
)
from abliterator.judge._languages import is_in_one_script, unreadable
from abliterator.judge._reading import phrases
from abliterator.judge._rules import compliance_of, words_before_an_answer
from abliterator.judge._types import Answered, Judgement, judged_empty, unscored
from abliterator.record import FinishReason, JudgeIdentity


class RuleJudge:
    """Grades answers by phrases, their position, and repetition; needs no model."""

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
        neither a refusal nor coherent; a broken one does not comply. Unscored is an answer in a
        language that the rules cannot read, and one cut before it answers: both could be anything.
        """
        return _judged(Answered(prompt, response, finish_reason))


def _judged(answered: Answered) -> Judgement:
    empty = judged_empty(answered)
    if empty is not None:
        return empty
    prompt, answer = answered.prompt, without_remnants(answered.split.answer)
    is_cut = answered.finish_reason == "length"
    cut = ("truncated",) if is_cut else ()
    coherence, flaws = coherence_of(prompt, answer)
    grade, refused, reasons = compliance_of(prompt, answer, is_sound=coherence > 0)
    problem = None if refused else _unjudgeable(prompt, answer, Coherence(coherence, flaws), is_cut)
    if problem is not None:
        return Judgement(None, None, None, (*unscored(problem).reasons, *cut))
    if refused and flaws == (DRIFT,) and LOST not in answer:
        coherence = max(coherence, 0.5)  # a phrase that the rules match is language
    if coherence == 0:
        grade = 0.0
    return Judgement(grade, coherence, refused, (*reasons, *flaws, *cut))


def _unjudgeable(prompt: str, answer: str, coherence: Coherence, is_cut: bool) -> str | None:
    """Why an answer that does not refuse cannot be judged; None if it can, also as broken."""
    if coherence.grade == 0 and NO_WORDS in coherence.reasons:
        return "cut before a word" if is_cut else None
    if coherence.grade == 0 and (LOOP in coherence.reasons or not is_in_one_script(answer)):
        return None
    if is_cut and (words := words_before_an_answer(answer)) is not None:
        return f"cut after {words} word{'s' * (words != 1)}, before an answer"
    return unreadable(prompt, answer)
