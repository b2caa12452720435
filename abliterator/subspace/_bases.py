"""Orthonormal bases, and cosines between directions."""

from __future__ import annotations

import torch
from torch import Tensor

from abliterator.errors import DirectionError

# Unit directions nearer than this to the span of the others are dependent: activations are captured
# in float32 or less, so what is left of one below 1e-5 is rounding, and QR would turn that noise
# into a direction of its own.
DEPENDENT_BELOW = 1e-5


def orthonormal_basis(directions: Tensor, names: list[str] | None = None) -> Tensor:
    """Q [H, k] with orthonormal columns that span `directions` [k, H] (QR of the unit directions).

    The signs are those of the directions (R has a positive diagonal), so the result is unique.

    Args:
        directions: [k, H], any floating dtype; lengths do not matter.
        names: what to call each direction in an error.

    Returns:
        [H, k] float64.

    Raises:
        DirectionError: for more directions than dimensions, and for a direction that is not finite,
            has zero length, or lies in the span of those before it; it is named.
    """
    vectors = directions.detach().cpu().double()  # not every device converts to float64
    k, d_model = vectors.shape
    labels = names or [f"direction {i}" for i in range(k)]
    if k > d_model:
        raise DirectionError(f"{k} directions cannot be independent in {d_model} dimensions.")
    lengths = vectors.norm(dim=1)
    for name, length in zip(labels, lengths.tolist(), strict=True):
        if not 0 < length < float("inf"):
            raise DirectionError(
                f"The direction of {name} has length {length}: nothing separates the two prompt "
                f"sets there. Choose another layer, or check that the sets differ."
            )
    q, r = torch.linalg.qr((vectors / lengths[:, None]).T)
    diagonal = r.diagonal()
    for i, name in enumerate(labels):
        if abs(float(diagonal[i])) < DEPENDENT_BELOW:
            raise DirectionError(
                f"The direction of {name} lies in the span of {', '.join(labels[:i])} (only "
                f"{abs(float(diagonal[i])):.1e} of its length lies outside). Stack other layers."
            )
    basis: Tensor = q * diagonal.sign()
    return basis


def random_basis(d_model: int, k: int, *, seed: int) -> Tensor:
    """Q [H, k] float64 of seeded Gaussian directions: uniform among all subspaces of rank k."""
    generator = torch.Generator().manual_seed(seed)
    return orthonormal_basis(torch.randn(k, d_model, generator=generator, dtype=torch.float64))


def orthonormal_columns(columns: Tensor) -> Tensor:
    """Q [H, k] with the span of `columns` [H, k], or of each block's in [L, H, k]; float64.

    Raises:
        DirectionError: as `orthonormal_basis`; the column is named, and its block.
    """
    names = [f"column {i}" for i in range(columns.shape[-1])]
    if columns.ndim == 2:
        return orthonormal_basis(columns.T, names)
    blocks = enumerate(columns)
    bases = [
        orthonormal_basis(block.T, [f"block {i}, {name}" for name in names]) for i, block in blocks
    ]
    return torch.stack(bases)


def basis_of_block(basis: Tensor, block: int) -> Tensor:
    """Q [H, k] of one block, from a basis [H, k] that all share or one for each [L, H, k]."""
    return basis if basis.ndim == 2 else basis[block]


def cosine_matrix(directions: Tensor) -> Tensor:
    """Cosines between the rows of `directions` [L, H]: [L, L] float64; a zero row gives zeros."""
    unit = torch.nn.functional.normalize(directions.double(), dim=1)
    return unit @ unit.T
