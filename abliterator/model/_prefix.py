"""Runs the common prefix of rendered prompts once: mostly a chat template's system prompt."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, TypeGuard

import torch

from abliterator.model._padding import continues_alike
from abliterator.model._run import cache_name, head_at, output_head

if TYPE_CHECKING:
    from transformers.cache_utils import DynamicCache

    from abliterator.model._load import LoadedModel

# Tokens from which on a common prefix is shared; sharing fewer saves no time.
WORTH_SHARING = 4


@dataclass(frozen=True)
class ByRow:
    """Interventions that differ between the rows of a batch.

    Attributes:
        of: the intervention of each prompt, 0 .. n - 1.
        choose: called with the edit of every row, before each forward pass.
    """

    of: Sequence[int]
    choose: Callable[[Sequence[int]], None]


@dataclass(frozen=True)
class Prefix:
    """The common prefix of prompts, and its keys and values.

    Attributes:
        length: tokens of each prompt that the model need not see again; 0 where nothing is shared.
        cache: keys and values of them, a row for each intervention, or one row.
        by_row: the intervention of each prompt, where they run under several.
    """

    length: int = 0
    cache: DynamicCache | None = None
    by_row: ByRow | None = None

    def enter(self, batch: Sequence[int]) -> DynamicCache | None:
        """Selects the interventions of a batch, and copies the prefix's cache for it.

        Args:
            batch: index of the prompt of each row.

        Returns:
            The cache that the batch continues; None where prompts have to be run whole.
        """
        rows = [0] * len(batch)
        if self.by_row is not None:
            rows = [self.by_row.of[i] for i in batch]
            self.by_row.choose(rows)
        return self.copied(rows)

    def copied(self, rows: Sequence[int]) -> DynamicCache | None:
        """A copy of the cache with the given rows; None where nothing is shared."""
        if self.cache is None:
            return None
        # what continues it puts longer tensors in place of these, which stay as they are
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        cache.batch_select_indices(torch.tensor(rows))
        return cache


def run_prefix(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], by_row: ByRow | None = None
) -> Prefix:
    """Runs the tokens with which all prompts begin, once for each intervention.

    Gradients flow through the cache. Nothing is shared where the prefix is shorter than
    `WORTH_SHARING` tokens; where the model's cache has anything but plain keys and values, since
    rows cannot continue from recurrent states and windows side by side; where the continued rest
    of a prompt has other logits than the whole prompt; and with a model's own code, which need not
    accept a cache under the name that `generate` uses today.
    """
    shared = shared_tokens(prompts)
    own_code = not type(loaded.model).__module__.startswith("transformers.")
    if shared < WORTH_SHARING or own_code:
        return Prefix(by_row=by_row)
    rows = [0]
    if by_row is not None:
        rows = list(range(max(by_row.of) + 1))
        by_row.choose(rows)
    ids = torch.tensor([list(prompts[0][:shared])] * len(rows), device=loaded.device)
    first = torch.zeros(1, dtype=torch.long)
    with head_at(output_head(loaded.model), first, first):
        output = loaded.model(input_ids=ids, use_cache=True)
    cache = getattr(output, cache_name(loaded.model), None)
    if not is_plain(cache):
        return Prefix(by_row=by_row)
    prefix = Prefix(shared, cache, by_row)
    is_continued = continues_alike(loaded, prompts[0], prefix, rows=len(rows))
    return prefix if is_continued else Prefix(by_row=by_row)


def is_plain(cache: object) -> TypeGuard[DynamicCache]:
    """Whether a model's cache has keys and values of all tokens, and nothing else."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if not isinstance(cache, DynamicCache) or type(cache) is not DynamicCache:
        return False
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def shared_tokens(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the common prefix in tokens, without the last token of any prompt."""
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
