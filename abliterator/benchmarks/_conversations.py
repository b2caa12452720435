"""Scores of the conversation suite from transcripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from abliterator.benchmarks._scores import DocScore, TaskScores
from abliterator.benchmarks._tasks import Task
from abliterator.benchmarks.conversation import items_of, passes
from abliterator.files import digest_of
from abliterator.prompts import Conversation


class Transcript(NamedTuple):
    """One conversation as it went.

    Attributes:
        prompt: what the model read before its last answer, its own earlier answers included.
        answer: the last answer, without any thinking.
        truncated: whether the answer was cut at the limit of tokens.
    """

    prompt: Conversation
    answer: str
    truncated: bool


def conversation_scores(
    task: Task, transcripts: Sequence[Transcript], settings: Mapping[str, Any]
) -> TaskScores:
    """The scores of a task: 1 where the last answer passes the check of its conversation, else 0.

    Args:
        task: of the conversation suite.
        transcripts: of its first conversations, in order.
        settings: what two sides must share to be compared, beside the task itself.
    """
    assert task.skill is not None
    items = items_of(task.skill)[: len(transcripts)]
    scores = tuple(
        DocScore(
            doc_id=number,
            filter="none",
            doc_hash=digest_of(item.model_dump(mode="json")),
            prompt_hash=digest_of(item.prompt.model_dump(mode="json")),
            target_hash=digest_of(item.check.model_dump(mode="json")),
            value=float(passes(item.check, answer, truncated=truncated)),
            empty=not answer.strip(),
            truncated=truncated,
            text=f"{prompt.text}\n\nAssistant: {answer}",
        )
        for number, (item, (prompt, answer, truncated)) in enumerate(
            zip(items, transcripts, strict=True)
        )
    )
    return TaskScores(
        task=task.name,
        metric=task.metric,
        n=len(scores),
        higher_is_better=task.higher_is_better,
        scores=scores,
        settings={
            **settings,
            "conversation_suite": task.version,
            "task_digest": task.digest,
        },
        aggregates=task.aggregates,
    )
