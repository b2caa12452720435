"""Perplexity of a fixed text that comes with the package."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import NamedTuple

import torch

from abliterator.engines import AnswerPath, Engine
from abliterator.errors import GenerationError
from abliterator.model import require_fit


class Perplexity(NamedTuple):
    """exp of the mean negative log-likelihood of `tokens` tokens."""

    value: float
    tokens: int


def neutral_text() -> list[str]:
    """The fixed text: short passages of plain English prose, written for this package."""
    text = files("abliterator.evaluation").joinpath("neutral.txt").read_text(encoding="utf-8")
    return [" ".join(passage.split()) for passage in text.split("\n\n") if passage.strip()]


def text_perplexity(engine: Engine, passages: Sequence[str]) -> Perplexity:
    """Perplexity of passages read one by one, as plain text: no chat template.

    Every token counts but the first of a passage, which a BOS token may be. A passage that is
    longer than the model's context is read in parts that are not.

    Raises:
        GenerationError: if there is no token to predict, or one has probability 0, or logits are
            NaN or infinite.
    """
    parts = [ids for ids in _parts_in_context(engine, passages) if len(ids) > 1]
    if not parts:
        raise GenerationError("There is no text to take a perplexity of. Give whole sentences.")
    require_fit(engine.limits, parts)
    paths = [AnswerPath(tuple(ids[:-1]), len(ids) - 1) for ids in parts]
    losses = [0.0] * len(parts)
    for index, logits in engine.logits(paths, max_batch_tokens=1):  # a batch each
        targets = torch.tensor(parts[index][1:])
        loss = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        losses[index] = loss.item()
    total = sum(losses)
    if not math.isfinite(total):
        raise GenerationError(
            "The model gives probability 0 to a token of the fixed text, so it has no perplexity. "
            "Its weights are damaged, or its tokenizer is another model's; download or make the "
            "model again."
        )
    tokens = sum(len(ids) - 1 for ids in parts)
    # a broken model can have any perplexity, but what is recorded must be a number
    return Perplexity(math.exp(min(total / tokens, 700.0)), tokens)


def _parts_in_context(engine: Engine, passages: Sequence[str]) -> Iterator[list[int]]:
    """Token ids of each passage, in parts of at most the model's context."""
    for passage in passages:
        ids = list(engine.tokenizer(passage)["input_ids"])
        step = engine.limits.context or max(1, len(ids))
        yield from (ids[i : i + step] for i in range(0, len(ids), step))
