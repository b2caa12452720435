"""Rows as one sequence, in which tokens that several rows begin with occur once."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from abliterator.tuning._types import Row

if TYPE_CHECKING:
    from abliterator.model import LoadedModel

# Tokens of one sequence, unless a row alone is longer: attention takes their number squared.
LONGEST = 512


@dataclass
class Packed:
    """A tree of tokens: each row is a path from a root, and prefixes that rows share are one path.

    Attributes:
        tokens: N of them, each after the one that it follows.
        positions: of each in its rows.
        follows: index of the token before each; -1 for the first of a row.
        places: of each row, the index of what predicts each token of its answer.
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    follows: list[int] = field(default_factory=list)
    places: list[list[int]] = field(default_factory=list)
    _known: dict[tuple[int, int], int] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        """Adds a row."""
        at, path = -1, []
        # the last token need not be read
        for position, token in enumerate((*row.prompt, *row.answer[:-1])):
            step = at, token
            if step not in self._known:
                self._known[step] = len(self.tokens)
                self.tokens.append(token)
                self.positions.append(position)
                self.follows.append(at)
            at = self._known[step]
            path.append(at)
        first = len(row.prompt) - 1
        self.places.append(path[first : first + len(row.answer)])

    def sees(self, width: int) -> Tensor:
        """[width, width] whether each token attends to each: to its own path, padding to itself."""
        sees = torch.eye(width, dtype=torch.bool)
        for i, before in enumerate(self.follows):
            if before >= 0:
                sees[i] |= sees[before]
        return sees


def takes_packed(loaded: LoadedModel) -> bool:
    """Whether the model's forward pass takes positions and a mask of every pair of tokens.

    What it makes of them has to be measured. A model that chooses some of all keys could choose
    others among those of other rows.
    """
    model = loaded.model
    return (
        type(model).__module__.startswith("transformers.")
        and "position_ids" in inspect.signature(model.forward).parameters
        and getattr(model.config.get_text_config(), "index_topk", None) is None
    )


def packed(rows: Sequence[Row]) -> tuple[list[Packed], list[int]]:
    """Rows in sequences of up to `LONGEST` tokens, rows of one prompt beside each other.

    Returns:
        The sequences, and the indices of the rows in them, in order.
    """
    result: list[Packed] = []
    order = sorted(range(len(rows)), key=lambda i: rows[i].prompt)
    for i in order:
        length = len(rows[i].prompt) + len(rows[i].answer)
        if not result or len(result[-1].tokens) + length > LONGEST:
            result.append(Packed())
        result[-1].add(rows[i])
    return result, order


def inputs_of(loaded: LoadedModel, sequences: Sequence[Packed]) -> dict[str, Any]:
    """Arguments of a forward pass over some sequences, padded to the longest."""
    width = max(len(sequence.tokens) for sequence in sequences)
    pads = [[0] * (width - len(sequence.tokens)) for sequence in sequences]
    ids = [s.tokens + pad for s, pad in zip(sequences, pads, strict=True)]
    positions = [s.positions + pad for s, pad in zip(sequences, pads, strict=True)]
    dtype, device = loaded.model.dtype, loaded.device
    sees = torch.stack([sequence.sees(width) for sequence in sequences])
    mask = torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)
    return {
        "input_ids": torch.tensor(ids, device=device),
        "position_ids": torch.tensor(positions, device=device),
        "attention_mask": mask[:, None].to(device),
        "use_cache": False,
    }


def places_of(sequences: Sequence[Packed]) -> tuple[Tensor, Tensor]:
    """Sequence and index of every token that predicts a token of an answer, row by row."""
    places = [(i, place) for i, s in enumerate(sequences) for row in s.places for place in row]
    which, at = zip(*places, strict=True)
    return torch.tensor(which), torch.tensor(at)
