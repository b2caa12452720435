"""Prompts of several scripted turns, answered one turn after the other, in rounds over all of them.

In round t every prompt that has a turn t is read up to there, with the model's own answers between
its turns, and answered. A prompt of one turn is answered in round 0, as it would be alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import TypeAlias

from abliterator.engines import Answer, Engine, Sampling
from abliterator.evaluation._budgets import answers_within
from abliterator.prompts import Prompt, next_turn, turns_of

Kept: TypeAlias = MutableMapping[int, Answer]
Render: TypeAlias = Callable[[Sequence[Prompt]], Sequence[Sequence[int]]]


def answer_conversations(
    engine: Engine,
    prompts: Sequence[Prompt],
    render: Render,
    *,
    max_new_tokens: int,
    batch_size: int,
    thinking_tokens: int | None = None,
    stop_ids: Sequence[int] | None = None,
    sampling: Sampling | None = None,
    answered: Kept | None = None,
    continued: Kept | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[Answer]]:
    """The answers to all turns of each prompt; the last of them is what is measured.

    Args:
        engine: the model.
        prompts: texts, and conversations with scripted turns or without.
        render: token ids of prompts, each read up to its next turn.
        max_new_tokens: at most this many tokens an answer.
        batch_size: prompts at a time.
        thinking_tokens: within which an answer must begin (`answers_within`).
        stop_ids: tokens that end an answer; left out, the model's own.
        sampling: draws the answers; greedy ones without.
        answered: answers of an earlier call that was interrupted, by turn * len(prompts) + index of
            the prompt; each batch's are added by `update`.
        continued: the same of the answers that went on behind the budget of the thinking.
        on_batch: called with the number of answers done after each batch.

    Raises:
        PromptError: for a conversation that has outgrown what the model reads.
    """
    answers: list[list[Answer]] = [[] for _ in prompts]
    for turn in range(max(map(turns_of, prompts), default=0)):
        rows = [i for i, prompt in enumerate(prompts) if turns_of(prompt) > turn]
        keys = [turn * len(prompts) + i for i in rows]
        new = answers_within(
            engine,
            render([next_turn(prompts[i], spoken(answers[i])) for i in rows]),
            max_new_tokens=max_new_tokens,
            thinking_tokens=thinking_tokens,
            batch_size=batch_size,
            stop_ids=stop_ids,
            answered=_OfTurn({} if answered is None else answered, keys),
            continued=_OfTurn({} if continued is None else continued, keys),
            on_batch=on_batch,
            sampling=sampling,
        )
        for i, answer in zip(rows, new, strict=True):
            answers[i].append(answer)
    return answers


def kept_answers(prompts: Sequence[Prompt], answered: Kept) -> list[list[Answer]] | None:
    """The answers of `answer_conversations` among those kept; None where one is missing."""
    keys = [
        [turn * len(prompts) + i for turn in range(turns_of(prompt))]
        for i, prompt in enumerate(prompts)
    ]
    if any(key not in answered for own in keys for key in own):
        return None
    return [[answered[key] for key in own] for own in keys]


def spoken(answers: Iterable[Answer]) -> list[str]:
    """What a model says in its answers, without its thinking."""
    return [answer.text[answer.start :] for answer in answers]


class _OfTurn(dict[int, Answer]):
    """The kept answers of one round, by the indices of its own prompts."""

    def __init__(self, kept: Kept, keys: Sequence[int]) -> None:
        self._kept, self._keys = kept, keys
        super().__init__((row, kept[key]) for row, key in enumerate(keys) if key in kept)

    def update(self, answers: Iterable[tuple[int, Answer]]) -> None:  # type: ignore[override]
        new = dict(answers)
        self._kept.update([(self._keys[row], answer) for row, answer in new.items()])
        super().update(new)
