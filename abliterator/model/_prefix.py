"""What rendered prompts begin with alike, run once: a chat template's system prompt, mostly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from abliterator.model._run import cache_name

if TYPE_CHECKING:
    from abliterator.model._load import LoadedModel

# Below so many tokens sharing them saves nothing.
WORTH_SHARING = 4


class Prefix(NamedTuple):
    """What was run already.

    Attributes:
        length: tokens of each prompt that the model need not see again.
        arguments: to be given to the model beside the rest: keys and values, one row a prompt.
    """

    length: int = 0
    arguments: Mapping[str, Any] = {}


def run_prefix(loaded: LoadedModel, prompts: Sequence[Sequence[int]]) -> Prefix:
    """Runs the tokens with which all prompts begin, once; gradients flow through what is kept.

    An empty prefix where too little is shared to be worth it, and where the model keeps anything
    but plain keys and values: recurrent states and windows are not what rows can continue from side
    by side.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    shared = _shared(prompts)
    if shared < WORTH_SHARING:
        return Prefix()
    ids = torch.tensor([list(prompts[0][:shared])], device=loaded.device)
    name = cache_name(loaded.model)
    with head_at(loaded.model.get_output_embeddings(), torch.tensor([0]), torch.tensor([0])):
        cache = getattr(loaded.model(input_ids=ids, use_cache=True), name)
    if type(cache) is not DynamicCache or any(type(x) is not DynamicLayer for x in cache.layers):
        return Prefix()
    cache.batch_repeat_interleave(len(prompts))
    return Prefix(shared, {name: cache})


def _shared(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens with which all prompts begin, but for the last of any: it has an answer to predict."""
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


@contextmanager
def head_at(head: nn.Module, rows: Tensor, positions: Tensor) -> Iterator[None]:
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
