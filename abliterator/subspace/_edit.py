"""The edit of a weight that writes the residual stream, also through a norm's gains after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# Lambda in S = 1 / ((g / median|g|)² + lambda²): how far the edit through a gain g may grow where g
# is near 0. Towards 0 the edited output is nearest to the ideal one and the change of W largest; in
# [0.3, 1] both are within a few percent of their best on Gemma 3.
GAIN_FLOOR = 0.5


@dataclass(frozen=True)
class Removal:
    """The edit W' = W - s A Bᵀ W. Of a subspace Bᵀ A = 1, so that s = 1 leaves Bᵀ W' = 0.

    The one place of the formula: baked weights, adapters, previews and interventions are made by
    its methods. A and B are U and V where a writer has an edit of its own, of which nothing follows
    for Bᵀ W'.

    Attributes:
        take: A [H, k], what is subtracted; or [C, H, k], one for each of C rows of a batch.
        read: B [H, k], what the stream reads of W: Q, or D Q up to a factor where gains follow.
    """

    take: Tensor
    read: Tensor

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Removal:
        """The same in another dtype, on another device.

        Converted on the device that it comes from, as its gradients are, so that float64 stays on
        the host.
        """
        return Removal(self.take.to(dtype).to(device), self.read.to(dtype).to(device))

    def reads(self, panel: Tensor) -> Tensor:
        """Bᵀ W [k, c] of a panel W [H, c] of the same dtype: what it writes along B."""
        return self.read.mT @ panel

    def remove(self, panel: Tensor, strength: float) -> Tensor:
        """Edits W [H, c], of the dtype of this removal, in place.

        Returns:
            Bᵀ W [k, c], what it wrote before.
        """
        wrote = self.reads(panel)
        panel.addmm_(self.take, wrote, alpha=-strength)
        return wrote

    def removed(self, writes: Tensor) -> Tensor:
        """A Bᵀ h of vectors h [..., H] of the same dtype: what s = 1 subtracts of each."""
        if self.read.ndim > 2 and self.read.shape[-1] == 1:
            # a product of matrices for each row takes five times as long where k = 1
            return (writes * self.read.mT).sum(dim=-1, keepdim=True) * self.take.mT
        return (writes @ self.read) @ self.take.mT


def ablate(panel: Tensor, basis: Tensor, strength: float) -> Tensor:
    """W' = W - s Q Qᵀ W, on the output side (Arditi et al. 2024, eq. 5, for rank k).

    Args:
        panel: W [H, c].
        basis: Q [H, k], orthonormal, same dtype.
        strength: s; 1 removes the subspace, 0 changes nothing.

    Returns:
        [H, c], a new tensor.
    """
    edited = panel.clone()
    Removal(basis, basis).remove(edited, strength)
    return edited


def removal_of_basis(basis: Tensor, gain: Tensor | None = None) -> Removal:
    """The removal of Q from a weight whose output a norm's gain multiplies before it is added.

    What reaches the stream is D f(W x + b) with D = diag(gain), f a positive scalar. A = S D Q
    (Qᵀ D S D Q)⁻¹ and B = D Q leave none of Q in it, for any positive diagonal S; S = 1 / ((g /
    median|g|)² + lambda²) keeps the rest near the ideal output D⁻¹ Q Qᵀ D W where g is not small.

    Args:
        basis: Q [H, k], orthonormal, float64.
        gain: g [H]; None where no norm follows, which gives A = B = Q.
    """
    if gain is None:
        return Removal(basis, basis)
    typical = gain.abs().median()
    # more than half of the gains are 0: any scale serves, only not 0
    relative = gain / (typical if typical > 0 else 1.0)
    read = relative[:, None] * basis
    weighted = read / (relative**2 + GAIN_FLOOR**2)[:, None]
    return Removal(weighted @ torch.linalg.pinv(read.T @ weighted, hermitian=True), read)


def in_turn(removals: Sequence[Removal]) -> Removal:
    """One removal that does what several do one after the other, the first of them first.

    (I - A_n B_nᵀ) ... (I - A_1 B_1ᵀ) = I - A Bᵀ, the compact WY form (Bischof and Van Loan 1987).
    """
    take, read = removals[0].take, removals[0].read
    for removal in removals[1:]:
        # (I - a bᵀ)(I - A Bᵀ) = I - A Bᵀ + a (bᵀA) Bᵀ - a bᵀ = I - [A, a] [B, b - B (Aᵀ b)]ᵀ
        read = torch.cat([read, removal.read - read @ (take.T @ removal.read)], dim=1)
        take = torch.cat([take, removal.take], dim=1)
    return Removal(take, read)


def left_in_turn(removals: Sequence[Removal]) -> Tensor:
    """Of each of several removals of rank 1, |bᵀ M| / |b|: what is left along its b after all.

    M is I - A Bᵀ of `in_turn`; of the last removal of a direction nothing is left.
    """
    reads = torch.cat([removal.read for removal in removals], dim=1)
    whole = in_turn(removals)
    remaining = reads - whole.read @ (whole.take.T @ reads)
    left: Tensor = remaining.norm(dim=0) / reads.norm(dim=0)
    return left


def keep_column_norms(edited: Tensor, lengths: Tensor) -> Tensor:
    """Scales each column of `edited` [H, c] to its length before the edit, `lengths` [c].

    A column scaled is a column still orthogonal to Q: the edit stays exact, which scaling rows
    would break. A column that the edit reduced to rounding noise (it lay in the subspace) stays as
    it is.
    """
    after = edited.norm(dim=0)
    noise = lengths * 64 * torch.finfo(edited.dtype).eps
    return edited * torch.where(
        after > noise, lengths / after.clamp_min(1e-300), torch.ones_like(after)
    )


def column_ranges(columns: int, width: int) -> list[tuple[int, int]]:
    """Half-open ranges that cut `columns` into panels of at most `width`."""
    edges = [*range(0, columns, width), columns]
    return list(pairwise(edges))
