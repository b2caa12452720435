"""How far an edit moved the next-token distribution.

Numbers only: the room does not know which prompts should have stayed the same, nor what is too far.
Base and edited are loaded one after the other, never together, so distributions are compared, not
models.

    base = first_token_logprobs(loaded_base, token_ids, max_batch_tokens=4096)
    edited = first_token_logprobs(loaded_edited, token_ids, max_batch_tokens=4096)
    kl_divergence(base, edited).mean()
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from abliterator.errors import GenerationError
from abliterator.model import LoadedModel, equal_length_batches, run_batches


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
        GenerationError: if there is no prompt, or one is empty, or logits are not finite.
    """
    if not token_ids or not all(map(len, token_ids)):
        raise GenerationError(
            "There are no prompts to compare, or one of them has no tokens. Give ordinary prompts."
        )
    rows: dict[int, Tensor] = {}
    batches = equal_length_batches(token_ids, max_batch_tokens)
    for batch, logprobs in run_batches(batches, partial(_logprobs, loaded, token_ids)):
        rows.update(zip(batch, logprobs, strict=True))
        if on_batch:
            on_batch(len(batch))
    return torch.stack([rows[i] for i in range(len(token_ids))])


def kl_divergence(base_logprobs: Tensor, edited_logprobs: Tensor) -> Tensor:
    """KL(base || edited) = sum_v p_base(v) (log p_base(v) - log p_edited(v)), per prompt.

    Args:
        base_logprobs: [N, V], natural logarithms.
        edited_logprobs: [N, V].

    Returns:
        [N] float64, nats.
    """
    # Row by row: a float64 copy of both tables at once would be four times their size.
    return torch.stack(
        [
            _kl(base.double(), edited.double())
            for base, edited in zip(base_logprobs, edited_logprobs, strict=True)
        ]
    )


def top1_agreement(base: Tensor, edited: Tensor) -> Tensor:
    """Whether the most likely token is the same: [N] bool, from two [N, V] of log-probabilities."""
    return base.argmax(dim=1) == edited.argmax(dim=1)


def _kl(base: Tensor, edited: Tensor) -> Tensor:
    probability = base.exp()
    # A token that the base excludes counts 0, not 0 x infinity.
    terms = torch.where(probability > 0, probability * (base - edited), 0.0)
    return terms.sum()


def _logprobs(loaded: LoadedModel, token_ids: Sequence[Sequence[int]], batch: list[int]) -> Tensor:
    """[rows, V] float32 on the CPU for prompts of one length."""
    ids = torch.tensor([list(token_ids[i]) for i in batch], device=loaded.device)
    one_position = {"logits_to_keep": 1} if _keeps_logits(loaded) else {}
    with torch.inference_mode():
        logits = loaded.model(input_ids=ids, use_cache=False, **one_position).logits[:, -1]
        logprobs: Tensor = logits.float().log_softmax(dim=1).cpu()
    if logprobs.isnan().any():
        raise GenerationError(
            "The model's next-token distribution is NaN. It overflows in this dtype, or its "
            "weights are damaged; try `--dtype float32`."
        )
    return logprobs


def _keeps_logits(loaded: LoadedModel) -> bool:
    """Whether the model can make the last position's logits alone; old remote code cannot."""
    return "logits_to_keep" in inspect.signature(loaded.model.forward).parameters
