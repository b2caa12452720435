"""The types that judges take and return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from abliterator.record import Completion, FinishReason, JudgeIdentity
from abliterator.thinking import Split, split_text


class Answered(NamedTuple):
    """A prompt and the response to it; a judge is shown the prompt and the answer."""

    prompt: str
    response: str  # the model's thinking, then its answer
    finish_reason: FinishReason = "stop"
    # index of the answer's first character in `response`; if None, the marks in the text decide
    answer_start: int | None = None

    @classmethod
    def of(cls, completion: Completion) -> Answered:
        """The fields of a completion that a judge needs."""
        c = completion
        return cls(c.prompt, c.response, c.finish_reason, c.answer_start)

    @property
    def split(self) -> Split:
        """The thinking and the answer of the response."""
        if self.answer_start is None:
            return split_text(self.response, is_cut=self.finish_reason == "length")
        return Split(self.response[: self.answer_start], self.response[self.answer_start :])


class Judgement(NamedTuple):
    """One answer judged: grades are 0, 0.5 or 1; None where the judge could not score it."""

    compliance: float | None
    coherence: float | None
    refused: bool | None
    reasons: tuple[str, ...] = ()
    # probability of each label of a local judge, by what is labelled
    labels: dict[str, dict[str, float]] | None = None

    @property
    def is_scored(self) -> bool:
        """Whether there is a verdict."""
        return None not in (self.compliance, self.coherence, self.refused)


class Judge(Protocol):
    """Grades answers."""

    @property
    def identity(self) -> JudgeIdentity:
        """Kind, model, prompt and version, for the record."""

    def judge_all(self, answers: Sequence[Answered]) -> list[Judgement]:
        """Judge every answer, blind to which model gave it; in their order."""


def unscored(reason: str) -> Judgement:
    """A judgement without grades, and the reason."""
    return Judgement(None, None, None, (f"unscored: {reason}",))


def judged_empty(answered: Answered) -> Judgement | None:
    """The judgement of a response without an answer, which is not sent to a judge; else None.

    An empty answer is neither a refusal nor coherent. Where it is unknown where the thinking ends,
    it is unscored.
    """
    split = answered.split
    if not split.is_known:
        return unscored("nothing tells the answer from the thinking before it")
    if split.answer.strip():
        return None
    cut = ("truncated",) if answered.finish_reason == "length" else ()
    return Judgement(0.0, 0.0, False, ("empty", *cut))
