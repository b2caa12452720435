"""The conversation suite answered by an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from abliterator.benchmarks import Task, TaskScores, Transcript, conversation_scores
from abliterator.benchmarks.conversation import Item, items_of, max_new_tokens
from abliterator.engines import Answer, Engine
from abliterator.errors import UnsupportedModel
from abliterator.evaluation._conversations import Kept, answer_conversations, spoken
from abliterator.prompts import Conversation, Prompt, turns_of
from abliterator.recipe import Benchmarks, Chat


def score_conversations(
    engine: Engine,
    task: Task,
    section: Benchmarks,
    chat: Chat,
    *,
    settings: dict[str, Any],
    stop_ids: Sequence[int] | None = None,
    answered: Kept | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> TaskScores:
    """Lets a model answer the conversations of one skill, and grades its last answers.

    Tools are given by the chat template where it writes them, else described by the user.

    Args:
        engine: the model.
        task: of the conversation suite.
        section: the recipe's `benchmarks`: limit and batch size.
        chat: the recipe's `chat`.
        settings: what else two sides must share to be compared.
        stop_ids: tokens that end an answer; left out, the model's own.
        answered: see `answer_conversations`.
        on_batch: see there.

    Raises:
        PromptError: for a conversation that has outgrown what the model reads.
    """
    assert task.skill is not None
    items, limit = conversations_of(task, section), max_new_tokens(task.skill)

    def render(prompts: Sequence[Prompt]) -> list[list[int]]:
        from abliterator.model import render_prompts

        return render_prompts(
            engine.tokenizer,
            prompts,
            engine.limits,
            name=task.name,
            max_new_tokens=limit,
            **chat.model_dump(include={"system", "template_kwargs"}),
        )

    by_template = _takes_tools(items, render)
    prompts = [item.prompt if by_template else item.described for item in items]
    answers = answer_conversations(
        engine,
        prompts,
        render,
        max_new_tokens=limit,
        batch_size=section.batch_size,
        stop_ids=stop_ids,
        answered=answered,
        on_batch=on_batch,
    )
    transcripts = [_transcript(p, own) for p, own in zip(prompts, answers, strict=True)]
    has_tools = bool(items[0].prompt.tools)
    tools = {"tools": "chat template" if by_template else "described"} if has_tools else {}
    stated = chat.model_dump(include={"system", "template_kwargs"}, exclude_defaults=True)
    shared = {"batch_size": section.batch_size, "max_new_tokens": limit, **stated, **settings}
    return conversation_scores(task, transcripts, shared | tools)


def conversations_of(task: Task, section: Benchmarks) -> tuple[Item, ...]:
    """The conversations of a task, as many as the task or the section asks for."""
    assert task.skill is not None
    return items_of(task.skill)[: task.limit or section.limit]


def answers_of(task: Task, section: Benchmarks) -> int:
    """How many answers the conversations of a task take."""
    return sum(turns_of(item.prompt) for item in conversations_of(task, section))


def _transcript(prompt: Conversation, answers: Sequence[Answer]) -> Transcript:
    """A conversation up to its last turn, and the answer to that."""
    *earlier, last = spoken(answers)
    if not last.strip():
        last = _call_beside_the_answer(answers[-1])
    return Transcript(prompt.answered(earlier), last, answers[-1].finish_reason == "length")


def _call_beside_the_answer(answer: Answer) -> str:
    """The call of a tool in a channel of its own, as gpt-oss makes it; "" where there is none."""
    _, mark, call = answer.text.rpartition("to=functions.")
    return mark + call


def _takes_tools(
    items: Sequence[Item], render: Callable[[Sequence[Prompt]], Sequence[Sequence[int]]]
) -> bool:
    """Whether the chat template writes tools; True where there are none to write."""
    if not items[0].prompt.tools:
        return True
    try:
        render([items[0].prompt])
    except UnsupportedModel:
        return False
    return True
