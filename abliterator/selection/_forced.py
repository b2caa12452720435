"""Next-token distributions along answers that are given, not generated."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from abliterator.model import (
    ByRow,
    LoadedModel,
    Prefix,
    cache_name,
    equal_length_batches,
    positions_from,
    require_numbers,
    run_batches,
    run_prefix,
)


def forced_logprobs(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    forced: Sequence[Sequence[int]],
    *,
    max_batch_tokens: int,
    by_row: ByRow | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Log-probabilities of every next token while each prompt is answered with `forced`.

    Args:
        loaded: the model, hooks and all.
        prompts: token ids, one rendered prompt each.
        forced: the tokens that follow each prompt; may be none.
        max_batch_tokens: tokens in a batch; batches hold rows of one length, unpadded. What all
            prompts begin with is run once for each intervention, and not counted.
        by_row: the intervention of each prompt, where they run under several.

    Yields:
        In the order of the batches: the index of a prompt, and [len(forced) + 1, V] float32 on the
        CPU: row i is the distribution after i forced tokens. As a stream, for all of them may be
        more than fits in memory.

    Raises:
        GenerationError: if logits are not finite.
    """
    prefix = shared_prefix(loaded, prompts, by_row)
    for count in sorted({len(tokens) for tokens in forced}):
        members = [i for i, tokens in enumerate(forced) if len(tokens) == count]
        rows = [[*prompts[i], *forced[i]][prefix.length :] for i in members]
        run = partial(_last, loaded, members, rows, count + 1, prefix)
        for batch, logprobs in run_batches(equal_length_batches(rows, max_batch_tokens), run):
            yield from zip((members[j] for j in batch), logprobs, strict=True)


def _last(
    loaded: LoadedModel,
    members: Sequence[int],
    rows: Sequence[Sequence[int]],
    keep: int,
    prefix: Prefix,
    batch: list[int],
) -> Tensor:
    """[len(batch), keep, V] log-probabilities at the last `keep` positions."""
    cache = prefix.enter([members[j] for j in batch])
    ids = torch.tensor([list(rows[i]) for i in batch], device=loaded.device)
    return last_logprobs(loaded, ids, keep=keep, cache=cache, start=prefix.length)[0]


def shared_prefix(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], by_row: ByRow | None
) -> Prefix:
    """What all prompts begin with, run once for each intervention; nothing is learned from it."""
    with torch.inference_mode():
        return run_prefix(loaded, prompts, by_row)


def last_logprobs(
    loaded: LoadedModel, ids: Tensor, *, keep: int, cache: Any = None, start: int = 0
) -> tuple[Tensor, Any]:
    """Next-token log-probabilities at the last `keep` positions of `ids` [N, T].

    Args:
        loaded: the model.
        ids: token ids, rows of one length.
        keep: positions.
        cache: what an earlier call returned, which these tokens continue; it is changed.
        start: tokens that are in the cache.

    Returns:
        [N, keep, V] float32 on the CPU, and the model's cache; None where it keeps none.

    Raises:
        GenerationError: for logits that are NaN or infinite.
    """
    # old remote code makes the logits of every position
    able = "logits_to_keep" in inspect.signature(loaded.model.forward).parameters
    only = {"logits_to_keep": keep} if able else {}
    name = cache_name(loaded.model)
    with torch.inference_mode():
        output = loaded.model(
            input_ids=ids,
            use_cache=True,
            **({} if cache is None else {name: cache}),
            **only,
            **positions_from(loaded.model, start, ids),
        )
        logits = require_numbers(output.logits[:, -keep:], loaded)
    return logits.float().log_softmax(dim=2).cpu(), getattr(output, name, None)
