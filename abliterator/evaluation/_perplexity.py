"""Perplexity of a fixed text that comes with the package."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import NamedTuple

import torch

from abliterator.divergence._distributions import last_logits
from abliterator.errors import GenerationError
from abliterator.model import LoadedModel, limits_of, require_fit


class Perplexity(NamedTuple):
    """exp of the mean negative log-likelihood of `tokens` tokens."""

    value: float
    tokens: int


def neutral_text() -> list[str]:
    """The fixed text: short passages of plain English prose, written for this package."""
    text = files("abliterator.divergence").joinpath("neutral.txt").read_text(encoding="utf-8")
    return [" ".join(passage.split()) for passage in text.split("\n\n") if passage.strip()]


def text_perplexity(loaded: LoadedModel, passages: list[str]) -> Perplexity:
    """Perplexity of passages read one by one, as plain text: no chat template.

    Every token counts but the first of a passage, which a BOS token may be. A passage that is
    longer than the model's context is read in parts that are not.

    Raises:
        GenerationError: if there is no token to predict, or one has probability 0, or logits are
            NaN or infinite.
    """
    total, tokens = 0.0, 0
    limits = limits_of(loaded)
    for ids in _parts(loaded, passages, limits.context):
        if len(ids) < 2:
            continue
        require_fit(limits, [ids])
        logits = last_logits(loaded, [ids[:-1]], len(ids) - 1)[0].float()
        targets = torch.tensor(ids[1:], device=logits.device)
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        tokens += len(targets)
    if not tokens:
        raise GenerationError("There is no text to take a perplexity of. Give whole sentences.")
    if not math.isfinite(total):
        raise GenerationError(
            f"The model in {loaded.folder} gives probability 0 to a token of the fixed text, so it "
            "has no perplexity. Its weights are damaged, or its tokenizer is another model's; "
            "download or make the model again."
        )
    # a broken model can have any perplexity, but what is recorded must be a number
    return Perplexity(math.exp(min(total / tokens, 700.0)), tokens)


def _parts(
    loaded: LoadedModel, passages: Sequence[str], context: int | None
) -> Iterator[list[int]]:
    """Token ids of each passage, in parts of at most `context`."""
    for passage in passages:
        ids = list(loaded.tokenizer(passage)["input_ids"])
        step = context or max(1, len(ids))
        yield from (ids[i : i + step] for i in range(0, len(ids), step))
