"""KL divergence between next-token distributions."""

from __future__ import annotations

import torch
from torch import Tensor

from abliterator.errors import GenerationError


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
    """Returns `kl` if all of it is finite.

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


def _kl(base: Tensor, edited: Tensor) -> Tensor:
    return kl_terms(base, edited).sum()
