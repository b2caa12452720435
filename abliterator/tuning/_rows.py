"""Log-probabilities of given answers, with gradients where the edit has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from abliterator.model import cache_name
from abliterator.tuning._types import Row

if TYPE_CHECKING:
    from torch import nn

    from abliterator.model import LoadedModel

# What a chat template puts before every prompt; below so many tokens sharing it saves nothing.
WORTH_SHARING = 4


def answer_logprobs(loaded: LoadedModel, rows: Sequence[Row]) -> tuple[Tensor, ...]:
    """Next-token log-probabilities at every token of each row's answer.

    One forward pass, right-padded: in a causal model nothing before the padding sees it. The tokens
    with which all rows begin run once, where the model keeps plain keys and values of them.

    Returns:
        One [len(answer), V] float32 tensor a row, on the model's device.
    """
    shared = _shared_prefix(rows)
    cache = _cache_of(loaded, rows[0].prompt[:shared]) if shared >= WORTH_SHARING else None
    start = 0 if cache is None else shared
    filled = [[*row.prompt, *row.answer][start:] for row in rows]
    width = max(map(len, filled))
    ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in filled])
    mask = torch.tensor([[1] * (start + len(t)) + [0] * (width - len(t)) for t in filled])
    if cache is not None:
        cache.batch_repeat_interleave(len(rows))
    with _head_at(loaded.model.get_output_embeddings(), *_places(rows, start)):
        logits = loaded.model(
            input_ids=ids.to(loaded.device),
            attention_mask=mask.to(loaded.device),
            use_cache=cache is not None,
            **{cache_name(loaded.model): cache},
        ).logits
    logprobs: Tensor = logits[0].float().log_softmax(dim=1)
    return torch.split(logprobs, [len(row.answer) for row in rows])


def token_logprobs(logprobs: Tensor, tokens: Sequence[int]) -> Tensor:
    """[T] log-probability of each of `tokens` under `logprobs` [T, V]."""
    index = torch.tensor(tokens, device=logprobs.device)
    return logprobs.gather(1, index[:, None])[:, 0]


def _shared_prefix(rows: Sequence[Row]) -> int:
    """Tokens with which all prompts begin, but for the last of any: it has an answer to predict."""
    columns = zip(*(row.prompt[:-1] for row in rows), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _cache_of(loaded: LoadedModel, tokens: Sequence[int]) -> Any:
    """Keys and values of `tokens`, with gradients; None where the model keeps anything else.

    Recurrent states and windows are not what rows can continue from side by side.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    ids = torch.tensor([tokens], device=loaded.device)
    with _head_at(loaded.model.get_output_embeddings(), torch.tensor([0]), torch.tensor([0])):
        output = loaded.model(input_ids=ids, use_cache=True)
    cache = getattr(output, cache_name(loaded.model))
    plain = type(cache) is DynamicCache and all(type(x) is DynamicLayer for x in cache.layers)
    return cache if plain else None


def _places(rows: Sequence[Row], start: int) -> tuple[Tensor, Tensor]:
    """Row and position of every hidden state that predicts a token of an answer."""
    at_row = [i for i, row in enumerate(rows) for _ in row.answer]
    # the position before a token predicts it
    at_token = [len(row.prompt) - 1 + i - start for row in rows for i in range(len(row.answer))]
    return torch.tensor(at_row), torch.tensor(at_token)


@contextmanager
def _head_at(head: nn.Module, rows: Tensor, positions: Tensor) -> Iterator[None]:
    """Lets the output head see the hidden states at these places only, as one row of them.

    The vocabulary is the largest dimension there is: logits of whole prompts would fill the memory.
    What a model does to its logits afterwards (scales, soft caps) is element by element.
    """

    def pick(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][rows, positions][None], *args[1:])

    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()
