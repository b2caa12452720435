"""The residual stream at some positions of given prompts, from hooks on the blocks.

Residual l (1 to n_layers) is the output of block l - 1: transformers' `hidden_states[-1]` has gone
through the final norm, and keeping every position of every layer would use memory for unused
numbers. Where blocks hold several streams (hyper-connections), it is the sum of what the sublayers
of block l - 1 hand to the mixing: docs/directions.md says why.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from abliterator.engines._protocol import Padding
from abliterator.engines._work import Work
from abliterator.errors import DirectionError
from abliterator.model import (
    LoadedModel,
    Prefix,
    cache_name,
    equal_length_batches,
    hooked,
    limits_of,
    positions_from,
    require_fit,
    run_prefix,
)


def hidden_states(
    loaded: LoadedModel, token_ids: Sequence[Sequence[int]], **options: Any
) -> Iterator[tuple[list[int], Tensor]]:
    """The residual stream of every prompt at some positions, as `Engine.hidden_states` gives it."""
    yield from hidden_work(loaded, token_ids, **options).results()


def hidden_work(
    loaded: LoadedModel,
    token_ids: Sequence[Sequence[int]],
    *,
    residuals: Sequence[Sequence[str]],
    positions: Sequence[int] = (-1,),
    padding: Padding = "none",
    max_batch_tokens: int = 4096,
    share_prefix: bool = False,
    skipped: Collection[int] = (),
) -> Work[Tensor]:
    """Batches that give the residual stream of every prompt, as `Engine.hidden_states` does.

    Args:
        loaded: the model.
        token_ids: one rendered prompt each.
        residuals: for each layer from 1, paths of the modules whose outputs add up to it.
        positions: counted from the end of each prompt.
        padding: of the batches.
        max_batch_tokens: tokens in a batch, padding included.
        share_prefix: run the tokens with which all prompts begin once; not with padding.
        skipped: indices of prompts that are not run.
    """
    for position in positions:
        _check_positions(token_ids, position)
    require_fit(limits_of(loaded), token_ids)
    batches, prefix = _mixed_length_batches, Prefix()
    if padding == "none":
        batches = equal_length_batches
        if share_prefix:
            prefix = _prefix_before(loaded, token_ids, min(positions))
    rests = [ids[prefix.length :] for ids in token_ids]
    return Work(
        partial(batches, rests, max_batch_tokens),
        partial(_hidden_states, loaded, rests, prefix, residuals, positions),
        is_divisible=padding == "none",
        run_batches=loaded.run_batches,
    ).without(skipped)


def _prefix_before(
    loaded: LoadedModel, token_ids: Sequence[Sequence[int]], position: int
) -> Prefix:
    """What all prompts begin with before `position`, counted from their end, if it is shared."""
    with torch.inference_mode():
        # its last token is never shared: the one at `position` has to run
        return run_prefix(loaded, [ids[: len(ids) + position + 1] for ids in token_ids])


def _hidden_states(
    loaded: LoadedModel,
    token_ids: Sequence[Sequence[int]],
    prefix: Prefix,
    residuals: Sequence[Sequence[str]],
    positions: Sequence[int],
    batch: list[int],
) -> Tensor:
    """[N, P, L, H] residuals of the prompts in `batch`, in the dtype of the model.

    Args:
        loaded: the model.
        token_ids: of each prompt, what follows `prefix`.
        prefix: what all of them begin with, if it has run.
        residuals: as of `hidden_work`.
        positions: counted from the end.
        batch: indices of prompts; of one length, unless they are padded.
    """
    by_path: dict[str, Tensor] = {}

    def keep(path: str, hidden: Tensor) -> None:
        # A copy, which a list of positions makes: a view would keep all positions alive.
        by_path[path] = hidden[:, list(positions)].to(loaded.device)

    rows = [token_ids[i] for i in batch]
    inputs = (
        _left_padded(rows)
        if len({len(row) for row in rows}) > 1
        else {"input_ids": torch.tensor(rows)}
    )
    hooks = {path: partial(keep, path) for paths in residuals for path in paths}
    base_model = loaded.model.base_model  # logits are not needed
    if "position_ids" not in inspect.signature(base_model.forward).parameters:
        inputs.pop("position_ids", None)
    on_device = {name: tensor.to(loaded.device) for name, tensor in inputs.items()}
    with torch.inference_mode(), hooked(loaded.model, hooks):
        if (cache := prefix.enter(batch)) is not None:
            on_device |= positions_from(base_model, prefix.length, on_device["input_ids"])
            on_device[cache_name(loaded.model)] = cache
        base_model(**on_device, use_cache=cache is not None)
    stream: list[Tensor] = []
    for paths in residuals:
        # The output of a skipped block is its input: Mllama skips the blocks that read images.
        is_skipped = len(paths) == 1 and paths[0] not in by_path
        stream.append(stream[-1] if is_skipped else reduce(torch.add, (by_path[p] for p in paths)))
    return torch.stack(stream, dim=2)


def _left_padded(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Input ids, mask and positions [N, T]; the id is 0 where the mask is 0."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def _mixed_length_batches(
    token_ids: Sequence[Sequence[int]], max_batch_tokens: int
) -> list[list[int]]:
    """Indices in order of length, cut so that rows x longest stays within the budget."""
    batches: list[list[int]] = []
    for index in sorted(range(len(token_ids)), key=lambda i: len(token_ids[i])):
        # Sorted, so this row is the longest of the batch that it would join.
        if batches and (len(batches[-1]) + 1) * len(token_ids[index]) <= max_batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _check_positions(token_ids: Sequence[Sequence[int]], position: int) -> None:
    if not token_ids:
        raise DirectionError("There are no prompts to capture. Give at least two of each kind.")
    if position >= 0:
        raise DirectionError(
            f"Position {position} is not counted from the end of the prompt. Use -1 for its last "
            "token."
        )
    for index, ids in enumerate(token_ids):
        if len(ids) < -position:
            raise DirectionError(
                f"Prompt {index} has {len(ids)} tokens, so none at position {position}. Use a "
                "position nearer to the end, or drop the prompt."
            )
