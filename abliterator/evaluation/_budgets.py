"""Answers of models that think first, with a budget for the thinking and one for the answer."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, Required, TypedDict, Unpack

from abliterator.engines import Answer, Engine, OnBatch, Sampling, answer_of
from abliterator.thinking import Splitter

Answered = MutableMapping[int, Answer]


class AnswerOptions(TypedDict, total=False):
    """How a model answers, whatever is asked.

    Attributes:
        max_new_tokens: of an answer, at most; without a budget, of the thinking too.
        batch_size: prompts at a time; None for the engine's choice.
        thinking_tokens: within which an answer must begin; None for one limit for both.
        stop_ids: tokens that end an answer; left out, the model's own.
        sampling: draws the answers; greedy ones without.
    """

    max_new_tokens: Required[int]
    batch_size: int | None
    thinking_tokens: int | None
    stop_ids: Sequence[int] | None
    sampling: Sampling | None


def answers_within(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    *,
    answered: Answered | None = None,
    continued: Answered | None = None,
    on_batch: OnBatch | None = None,
    **options: Unpack[AnswerOptions],
) -> list[Answer]:
    """Answers of which the thinking has a budget of its own.

    The tokens of greedy ones are those of one greedy decoding. It ends where the answer has
    `max_new_tokens`, or where it has not begun within `thinking_tokens`: then the thinking is not
    closed by force, since no user would get what follows, and the answer is cut before its first
    token.

    Args:
        engine: the model.
        prompts: token ids.
        answered: the answers of an earlier call that was interrupted (`Engine.answers`).
        continued: the same of the answers that went on behind the budget.
        on_batch: called with the number of prompts done after each batch.
        options: see `AnswerOptions`.
    """
    max_new_tokens, thinking_tokens = options["max_new_tokens"], options.get("thinking_tokens")
    how: dict[str, Any] = {
        key: options[key] for key in ("batch_size", "stop_ids", "sampling") if key in options
    }
    first = engine.answers(
        prompts,
        max_new_tokens=thinking_tokens or max_new_tokens,
        answered=answered,
        on_batch=on_batch,
        **how,
    )
    if thinking_tokens is None:
        return first
    splitter = Splitter(engine.tokenizer)
    answers = [
        _within(splitter, prompt, answer, max_new_tokens)
        for prompt, answer in zip(prompts, first, strict=True)
    ]
    places = range(len(prompts))
    unfinished = [i for i in places if _goes_on(splitter, prompts[i], answers[i], max_new_tokens)]
    if not unfinished:
        return answers
    rest = engine.answers(
        [(*prompts[i], *answers[i].token_ids) for i in unfinished],
        max_new_tokens=max_new_tokens,
        answered=continued,
        **how,
    )
    for i, continuation in zip(unfinished, rest, strict=True):
        row = (*answers[i].token_ids, *continuation.token_ids)
        is_ended = continuation.finish_reason == "stop"
        whole = answer_of(splitter, prompts[i], row, (), is_ended=is_ended)
        if whole.start_token <= thinking_tokens:
            answers[i] = _within(splitter, prompts[i], whole, max_new_tokens)
    return answers


def _goes_on(
    splitter: Splitter, prompt: Sequence[int], answer: Answer, max_new_tokens: int
) -> bool:
    """Whether an answer has begun, or may have, and may have more tokens."""
    n = len(answer.token_ids) - answer.start_token
    if answer.finish_reason != "length" or n >= max_new_tokens:
        return False
    # what was cut may be the beginning of a mark of thinking, or of an answer that begins like one
    return n > 0 or bool(splitter.split(prompt, answer.token_ids, is_cut=False).answer.strip())


def _within(
    splitter: Splitter, prompt: Sequence[int], answer: Answer, max_new_tokens: int
) -> Answer:
    """The answer without the tokens beyond its budget."""
    end = answer.start_token + max_new_tokens
    if len(answer.token_ids) <= end:
        return answer
    return answer_of(splitter, prompt, answer.token_ids[:end], ())
