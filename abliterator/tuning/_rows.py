"""Log-probabilities of given answers, with gradients where the edit has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from abliterator.model import (
    Prefix,
    cache_name,
    head_at,
    output_head,
    packing_is_neutral,
    positions_from,
    require_numbers,
    right_padding_is_neutral,
    run_prefix,
)
from abliterator.tuning._packed import Packed, inputs_of, packed, places_of, takes_packed
from abliterator.tuning._types import Row

if TYPE_CHECKING:
    from abliterator.model import LoadedModel


def answer_logprobs(loaded: LoadedModel, rows: Sequence[Row]) -> tuple[Tensor, ...]:
    """Next-token log-probabilities at every token of each row's answer.

    Returns:
        One [len(answer), V] float32 tensor a row, on the model's device.

    Raises:
        GenerationError: for logits that are NaN or infinite.
    """
    return tuple(logits.float().log_softmax(dim=1) for logits in answer_logits(loaded, rows))


def answer_logits(loaded: LoadedModel, rows: Sequence[Row]) -> tuple[Tensor, ...]:
    """Next-token logits at every token of each row's answer.

    Rows run as one sequence in which what several of them begin with occurs once, unless the model
    computes something else then (`model.packing_is_neutral`): in a right-padded batch, for in a
    causal model nothing before the padding sees it, where the tokens with which all rows begin run
    once if the model keeps plain keys and values of them. Where padding is seen, in a pass for each
    length.

    Returns:
        One [len(answer), V] tensor a row, in the model's dtype, on its device.

    Raises:
        GenerationError: for logits that are NaN or infinite.
    """
    if takes_packed(loaded):
        sequences, order = packed(rows)
        longest = max(range(len(rows)), key=lambda i: len(rows[i].prompt) + len(rows[i].answer))

        def alone_and_packed() -> tuple[Tensor, Tensor]:
            return (
                _alone(loaded, rows[longest]),
                _packed_logits(loaded, sequences)[order.index(longest)],
            )

        width = len(rows[longest].prompt) + len(rows[longest].answer)
        if packing_is_neutral(loaded, alone_and_packed, width=width):
            by_row = dict(zip(order, _packed_logits(loaded, sequences), strict=True))
            return tuple(by_row[i] for i in range(len(rows)))
    return _batched_logits(loaded, rows)


def _alone(loaded: LoadedModel, row: Row) -> Tensor:
    """Logits of one row, in a pass with no positions and no mask of ours."""
    ids = torch.tensor([[*row.prompt, *row.answer]], device=loaded.device)
    with head_at(output_head(loaded.model), *_places([row], 0)):
        logits: Tensor = loaded.model(input_ids=ids, use_cache=False).logits
    return logits[0]


def _packed_logits(loaded: LoadedModel, sequences: Sequence[Packed]) -> tuple[Tensor, ...]:
    """Logits of the rows of some sequences, in the order in which these have them."""
    with head_at(output_head(loaded.model), *places_of(sequences)):
        logits = loaded.model(**inputs_of(loaded, sequences)).logits
    lengths = [len(places) for sequence in sequences for places in sequence.places]
    return torch.split(require_numbers(logits[0], loaded), lengths)


def _batched_logits(loaded: LoadedModel, rows: Sequence[Row]) -> tuple[Tensor, ...]:
    """`answer_logits` of rows in padded batches."""
    prefix = run_prefix(loaded, [row.prompt for row in rows])
    lengths = [len(row.prompt) + len(row.answer) for row in rows]
    padded = [i for i, length in enumerate(lengths) if length < max(lengths)]
    longest = rows[max(padded, key=lengths.__getitem__, default=0)]
    if not padded or right_padding_is_neutral(
        loaded, [*longest.prompt, *longest.answer], width=max(lengths)
    ):
        return _padded_logits(loaded, rows, range(len(rows)), prefix)
    by_row: dict[int, Tensor] = {}
    for length in sorted(set(lengths)):
        members = [i for i, row_length in enumerate(lengths) if row_length == length]
        logits = _padded_logits(loaded, [rows[i] for i in members], members, prefix)
        by_row.update(zip(members, logits, strict=True))
    return tuple(by_row[i] for i in range(len(rows)))


def _padded_logits(
    loaded: LoadedModel, rows: Sequence[Row], batch: Sequence[int], prefix: Prefix
) -> tuple[Tensor, ...]:
    """`answer_logits` of rows that run together; `batch` are their indices among all rows."""
    start, cache = prefix.length, prefix.enter(batch)
    cache_arguments = {} if cache is None else {cache_name(loaded.model): cache}
    sequences = [[*row.prompt, *row.answer][start:] for row in rows]
    width = max(map(len, sequences))
    ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in sequences])
    mask = torch.tensor([[1] * (start + len(t)) + [0] * (width - len(t)) for t in sequences])
    ids = ids.to(loaded.device)
    with head_at(output_head(loaded.model), *_places(rows, start)):
        logits = loaded.model(
            input_ids=ids,
            attention_mask=mask.to(loaded.device),
            use_cache=cache is not None,
            **positions_from(loaded.model, start, ids),
            **cache_arguments,
        ).logits
    return torch.split(require_numbers(logits[0], loaded), [len(row.answer) for row in rows])


def token_logprobs(logprobs: Tensor, tokens: Sequence[int]) -> Tensor:
    """[T] log-probability of each of `tokens` under `logprobs` [T, V]."""
    index = torch.tensor(tokens, device=logprobs.device)
    return logprobs.gather(1, index[:, None])[:, 0]


def _places(rows: Sequence[Row], start: int) -> tuple[Tensor, Tensor]:
    """Row and position of every hidden state that predicts a token of an answer."""
    at_row = [i for i, row in enumerate(rows) for _ in row.answer]
    # the position before a token predicts it
    at_token = [len(row.prompt) - 1 + i - start for row in rows for i in range(len(row.answer))]
    return torch.tensor(at_row), torch.tensor(at_token)
