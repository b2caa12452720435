"""Completions, and a judge that gives them the grades of a script."""

from __future__ import annotations

from abliterator.judge import (
    RuleJudge,
    judge_completions,
)
from abliterator.record import Completion, JudgeIdentity


class Scripted:
    """A judge that says what it is told, in turn."""

    def __init__(self, *judgements):
        self.left = list(judgements)

    @property
    def identity(self):
        return JudgeIdentity(kind="scripted", version="1")

    def judge_all(self, answers):
        return [self.left.pop(0) for _ in answers]


def completion(index, side="base", finish_reason="stop"):
    return Completion(
        set="target",
        side=side,
        index=index,
        prompt=f"Question {index}?",
        response="Yes.",
        finish_reason=finish_reason,
        n_tokens=2,
    )


def judged_as(response, said=None, finish_reason="stop"):
    """The verdict on one response, by rules or as told."""
    asked = completion(0, finish_reason=finish_reason).model_copy(update={"response": response})
    return judge_completions([asked], RuleJudge() if said is None else Scripted(said))[0]
