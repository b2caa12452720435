"""First two moments of the residual stream, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abliterator.errors import DirectionError


@dataclass(frozen=True)
class MomentSet:
    """First two moments of N residual vectors at every layer.

    Attributes:
        n: number of prompts.
        mean: [L, H] float64; row l - 1 is residual l (the output of block l - 1).
        m2: [L, H] float64, sum of squared deviations from the mean.
    """

    n: int
    mean: Tensor
    m2: Tensor


def merged(parts: Sequence[MomentSet]) -> MomentSet:
    """The moments of all prompts of `parts` together (Chan et al. 1979)."""
    n = sum(part.n for part in parts)
    mean = torch.stack([part.n * part.mean for part in parts]).sum(dim=0) / n
    between = torch.stack([part.n * (part.mean - mean).square() for part in parts])
    within = torch.stack([part.m2 for part in parts])
    return MomentSet(n, mean, (within + between).sum(dim=0))


def require_finite(vectors: Tensor) -> None:
    """Checks residual vectors [N, L, H] of all layers, from 1.

    Raises:
        DirectionError: if a value is NaN or infinite; it names the residual layer.
    """
    finite = torch.isfinite(vectors).all(dim=2).all(dim=0)
    if not finite.all():
        layer = int((~finite).nonzero()[0].item()) + 1
        raise DirectionError(
            f"The residual stream at layer {layer} holds NaN or infinite values. The model "
            f"overflows in this dtype, or its weights are damaged; try `--dtype float32`."
        )


class Moments:
    """Accumulates `MomentSet` batch by batch in float64 (Chan et al. 1979, pairwise update)."""

    def __init__(self, n_layers: int, d_model: int, begun: MomentSet | None = None) -> None:
        """Begins with no vectors, or goes on where `begun` was frozen."""
        if begun is not None:
            self._n, self._mean, self._m2 = begun.n, begun.mean.clone(), begun.m2.clone()
            return
        self._n = 0
        self._mean = torch.zeros(n_layers, d_model, dtype=torch.float64)
        self._m2 = torch.zeros(n_layers, d_model, dtype=torch.float64)

    def update(self, vectors: Tensor) -> None:
        """Adds a batch [N, L, H] of any floating dtype and device.

        Raises:
            DirectionError: if a value is not finite; it names the residual layer.
        """
        batch = vectors.detach().cpu().double()  # not every device converts to float64
        if batch.shape[1:] != self._mean.shape:
            raise ValueError(
                f"vectors are {tuple(batch.shape)}, expected [N, *{tuple(self._mean.shape)}]"
            )
        require_finite(batch)
        count = batch.shape[0]
        mean = batch.mean(dim=0)
        gap = mean - self._mean
        total = self._n + count
        self._m2 += ((batch - mean) ** 2).sum(dim=0) + gap**2 * (self._n * count / total)
        self._mean += gap * (count / total)
        self._n = total

    def freeze(self) -> MomentSet:
        """The moments so far, as copies that later updates do not change."""
        return MomentSet(self._n, self._mean.clone(), self._m2.clone())
