"""Pairs (U, V) of rank-r edits W' = W - s U Vᵀ W, one for each module that writes.

A tensor [M, 2, H, r] holds U and V of M modules. V's columns have length 1, and U has a length of
its own (Frobenius), so that s alone says how strongly a module is edited: for r = 1 and no gains,
U and V are unit vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from abliterator.subspace._edit import Removal


def is_by_writer(basis: Tensor) -> bool:
    """Whether a basis is pairs [M, 2, H, r], one a module; else it is Q [H, k], or [L, H, k]."""
    return basis.ndim == 4


def pairs_of_removals(removals: Sequence[Removal]) -> Tensor:
    """[M, 2, H, r]: U = A and V = B of removals of one rank, with columns of V of length 1.

    The columns of U make up for it: U Vᵀ = A Bᵀ.
    """
    pairs = []
    for removal in removals:
        lengths = removal.read.norm(dim=0)
        pairs.append(torch.stack([removal.take * lengths, removal.read / lengths]))
    return torch.stack(pairs)


def with_lengths(columns: Tensor, lengths: Tensor) -> Tensor:
    """Pairs [M, 2, H, r] of any `columns` of that shape: finite and bounded, whatever these are.

    Columns of V get length 1, U the Frobenius norm that `lengths` has for its module. Gradients
    flow to `columns`; columns of zeros stay zeros.

    Args:
        columns: [M, 2, H, r].
        lengths: of U [M], the same dtype.
    """
    take, read = columns.unbind(dim=1)
    take = normalize(take.flatten(1), dim=1).view_as(take) * lengths[:, None, None]
    return torch.stack([take, normalize(read, dim=1)], dim=1)


def lengths_of(pairs: Tensor) -> Tensor:
    """The Frobenius norm of each module's U [M], of pairs [M, 2, H, r]."""
    lengths: Tensor = pairs[:, 0].flatten(1).norm(dim=1)
    return lengths


def pair_distances(pairs: Tensor, start: Tensor) -> Tensor:
    """‖U Vᵀ - U₀ V₀ᵀ‖² / ‖U₀ V₀ᵀ‖² (Frobenius) of each module [M]; no [H, H] matrix is made."""
    before = _inner(start, start)
    return (_inner(pairs, pairs) - 2 * _inner(pairs, start) + before) / before


def pair_cosines(pairs: Tensor, start: Tensor) -> Tensor:
    """The cosine between U Vᵀ and U₀ V₀ᵀ (Frobenius) of each module [M]."""
    return _inner(pairs, start) / (_inner(pairs, pairs) * _inner(start, start)).sqrt()


def _inner(pairs: Tensor, others: Tensor) -> Tensor:
    """<U Vᵀ, U₂ V₂ᵀ> = tr((Uᵀ U₂) (V₂ᵀ V)) of each module [M]."""
    takes, reads = (pairs.mT @ others).unbind(dim=1)
    return (takes * reads).sum(dim=(1, 2))
