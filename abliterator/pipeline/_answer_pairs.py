"""The answers of base and edited to the same held-out prompts, as a finished run left them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from abliterator.files import read_lines
from abliterator.pipeline._stage import Artefact, Value
from abliterator.pipeline._workspace import Workspace
from abliterator.pipeline.stages.judge import VERDICTS
from abliterator.pipeline.stages.rollouts import ANSWERS
from abliterator.record import Completion, Verdict


class AnswerPair(NamedTuple):
    """Both answers to one evaluation prompt.

    Attributes:
        set: "target", "neutral" or "over_refusal".
        prompt: as written.
        base: the base's answer, without its thinking.
        edited: that of the edited model.
        is_answered_now: whether the base refused and the edited model did not.
    """

    set: str
    prompt: str
    base: str
    edited: str
    is_answered_now: bool


def answer_pairs(out: Path) -> list[AnswerPair]:
    """All pairs of a build, in the order of its prompts.

    Raises:
        OutputError: if the answers were not made, or changed since.
    """
    answers = _read_lines(out, ANSWERS, Completion)
    verdicts = _read_lines(out, VERDICTS, Verdict)
    refused = {(v.side, v.set, v.index): v.refused for v in verdicts}
    by_side = {(a.side, a.set, a.index): a for a in answers}
    return [
        AnswerPair(
            base.set,
            base.prompt,
            _answer(base),
            _answer(by_side["edited", name, index]),
            bool(refused["base", name, index]) and refused["edited", name, index] is False,
        )
        for (side, name, index), base in by_side.items()
        if side == "base"
    ]


def _read_lines(out: Path, artefact: Artefact, kind: type[Value]) -> list[Value]:
    path = Workspace(out).artefact(artefact.stage, out / artefact.name)
    return [kind.model_validate_json(line) for line in read_lines(path)]


def _answer(completion: Completion) -> str:
    return completion.response[completion.answer_start or 0 :].strip()
