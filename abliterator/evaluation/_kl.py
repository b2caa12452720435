"""Next-token distributions of one position, and how far two of them are apart."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from abliterator.errors import GenerationError
from abliterator.model import (
    LoadedModel,
    equal_length_batches,
    limits_of,
    require_fit,
    require_numbers,
    run_batches,
)


def first_token_logprobs(
    loaded: LoadedModel,
    token_ids: Sequence[Sequence[int]],
    *,
    max_batch_tokens: int,
    on_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """Log-probabilities of the first answer token, after each prompt.

    Prompts run in batches of equal length without padding; of each, only the last position's
    logits are ever made (where the model's code can do that).

    Args:
        loaded: the model.
        token_ids: one rendered prompt each; at least one, none empty.
        max_batch_tokens: tokens in a batch.
        on_batch: called with the number of prompts done after each batch.

    Returns:
        [N, V] float32 on the CPU, natural logarithms, in the order of the prompts.

    Raises:
        GenerationError: if there is no prompt, or one is empty, or logits are NaN or infinite.
        PromptError: for a prompt that is longer than what the model reads.
    """
    require_prompts(loaded, token_ids)
    rows: dict[int, Tensor] = {}
    batches = equal_length_batches(token_ids, max_batch_tokens)
    for batch, logprobs in run_batches(batches, partial(_logprobs, loaded, token_ids)):
        rows.update(zip(batch, logprobs, strict=True))
        if on_batch:
            on_batch(len(batch))
    return torch.stack([rows[i] for i in range(len(token_ids))])


def kl_divergence(base_logprobs: Tensor, edited_logprobs: Tensor) -> Tensor:
    """KL(base || edited) = sum_v p_base(v) (log p_base(v) - log p_edited(v)), per row.

    Args:
        base_logprobs: [N, V], natural logarithms.
        edited_logprobs: [N, V].

    Returns:
        [N] float64, nats; infinite where the edited excludes a token that the base allows, NaN
        where either is no distribution.
    """
    # Row by row: a float64 copy of both tables at once would be four times their size.
    return torch.stack(
        [
            _kl(base.double(), edited.double())
            for base, edited in zip(base_logprobs, edited_logprobs, strict=True)
        ]
    )


def kl_terms(base: Tensor, edited: Tensor) -> Tensor:
    """p_base (log p_base - log p_edited) of every token; gradients flow to `edited`.

    A token that the base excludes counts 0, not 0 x infinity. NaN stays NaN.
    """
    probability = base.exp()
    return probability * (base - edited).masked_fill(probability == 0, 0.0)


def top1_agreement(base: Tensor, edited: Tensor) -> Tensor:
    """Whether the most likely token is the same: [N] bool, from two [N, V] of log-probabilities."""
    return base.argmax(dim=1) == edited.argmax(dim=1)


def require_finite(kl: Tensor) -> Tensor:
    """The same KL, of which every value is a number.

    Raises:
        GenerationError: for infinite KL, and for NaN.
    """
    if kl.isfinite().all():
        return kl
    raise GenerationError(
        "KL(base || edited) is not finite: the edited model gives probability 0 to a token that "
        "the base allows (a logit of -inf), or one of them has no distribution. The edit overflows "
        "in this dtype, or its weights are damaged; try `--dtype float32`, or a smaller strength."
    )


def require_prompts(loaded: LoadedModel, token_ids: Sequence[Sequence[int]]) -> None:
    """Raises where there is nothing to run, and for what the model cannot read."""
    if not token_ids or not all(map(len, token_ids)):
        raise GenerationError(
            "There are no prompts to compare, or one of them has no tokens. Give ordinary prompts."
        )
    require_fit(limits_of(loaded), token_ids)


def last_logits(loaded: LoadedModel, rows: Sequence[Sequence[int]], positions: int) -> Tensor:
    """Logits of the last `positions` positions of rows of one length: [rows, positions, V].

    In the model's own dtype, on its device.

    Raises:
        GenerationError: for logits that are NaN or infinite.
    """
    ids = torch.tensor([list(row) for row in rows], device=loaded.device)
    kept = {"logits_to_keep": positions} if _keeps_logits(loaded) else {}
    with torch.inference_mode():
        output = loaded.model(input_ids=ids, use_cache=False, **kept).logits
        return require_numbers(output[:, -positions:], loaded)


def _kl(base: Tensor, edited: Tensor) -> Tensor:
    return kl_terms(base, edited).sum()


def _logprobs(loaded: LoadedModel, token_ids: Sequence[Sequence[int]], batch: list[int]) -> Tensor:
    """[rows, V] float32 on the CPU for prompts of one length."""
    logits = last_logits(loaded, [token_ids[i] for i in batch], 1)[:, -1]
    return logits.float().log_softmax(dim=1).cpu()


def _keeps_logits(loaded: LoadedModel) -> bool:
    """Whether the model can make the last positions' logits alone; old remote code cannot."""
    return "logits_to_keep" in inspect.signature(loaded.model.forward).parameters
