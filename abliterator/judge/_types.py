"""What passes between judges and whoever asks them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from abliterator.record import FinishReason, JudgeIdentity

_TAG = r"(?:think|thinking|reasoning)"
_THOUGHTS = re.compile(rf"\A(?:.*</{_TAG}>|\s*<{_TAG}>.*)", re.DOTALL | re.IGNORECASE)


class Answered(NamedTuple):
    """A prompt and the answer to it: all that a judge is shown."""

    prompt: str
    response: str
    finish_reason: FinishReason = "stop"


class Judgement(NamedTuple):
    """One answer judged: grades are 0, 0.5 or 1; None where the judge could not score it."""

    compliance: float | None
    coherence: float | None
    refused: bool | None
    reasons: tuple[str, ...] = ()

    @property
    def is_scored(self) -> bool:
        """Whether there is a verdict."""
        return None not in (self.compliance, self.coherence, self.refused)


class Judge(Protocol):
    """Whatever turns answers into judgements."""

    @property
    def identity(self) -> JudgeIdentity:
        """Which judge this is, for the record."""

    def judge_all(self, answers: Sequence[Answered]) -> list[Judgement]:
        """Judge every answer, blind to which model gave it; in their order."""


def unscored(reason: str) -> Judgement:
    """No verdict, and why."""
    return Judgement(None, None, None, (f"unscored: {reason}",))


def split_thinking(response: str) -> tuple[str, str]:
    """(thinking, answer): what a reasoning model says to itself is not its answer.

    The block may have been opened by the chat template; one that never closes leaves no answer.
    """
    match = _THOUGHTS.match(response)
    end = match.end() if match else 0
    return response[:end], response[end:]


def judged_empty(answered: Answered) -> Judgement | None:
    """The judgement of an answer without a word in it, which no judge needs to be asked for.

    It is neither a refusal nor coherent.
    """
    if split_thinking(answered.response)[1].strip():
        return None
    cut = ("truncated",) if answered.finish_reason == "length" else ()
    return Judgement(0.0, 0.0, False, ("empty", *cut))
