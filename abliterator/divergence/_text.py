"""Perplexity of a fixed text that comes with the package."""

from __future__ import annotations

import math
from importlib.resources import files
from typing import NamedTuple

import torch

from abliterator.divergence._distributions import last_logits
from abliterator.errors import GenerationError
from abliterator.model import LoadedModel


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

    Every token counts but the first of a passage, which a BOS token may be.

    Raises:
        GenerationError: if there is no token to predict, or logits are NaN.
    """
    total, tokens = 0.0, 0
    for passage in passages:
        ids = list(loaded.tokenizer(passage)["input_ids"])
        if len(ids) < 2:
            continue
        logits = last_logits(loaded, [ids[:-1]], len(ids) - 1)[0].float()
        targets = torch.tensor(ids[1:], device=logits.device)
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        tokens += len(targets)
    if not tokens:
        raise GenerationError("There is no text to take a perplexity of. Give whole sentences.")
    # a broken model can have any perplexity, but what is told must be a number
    return Perplexity(math.exp(min(total / tokens, 700.0)), tokens)
