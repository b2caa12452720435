"""Roundings chosen so that what is stored writes nothing into the subspace."""

from __future__ import annotations

from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from abliterator.subspace._edit import column_ranges

# Compensated rounding moves elements in so many rows per direction of the subspace: fewer rows
# would have to move further (more noise), more rows cost time.
COMPENSATED_ROWS = 128

# Of these rows' elements, so many per direction and column are rounded one by one: those that can
# move what is read by the smallest steps, which can cancel what the coarser ones cannot.
FINE_ELEMENTS = 24

# A row that reads less than this share of the typical one would have to move far for little.
WEAK_ROW = 0.25

# What a squared move costs against a squared error that it cancels, in typical squared reads of a
# row: just enough that no element moves far to cancel what it hardly reads.
MOVE_COST = 1e-4

# Numbers that the rounding one by one holds at once: columns beyond that wait.
HELD_READS = 1 << 20


class Store(Protocol):
    """How numbers are stored: the nearest representable one of each, in their dtype."""

    def __call__(
        self, numbers: Tensor, places: Tensor | None = None, columns: slice = slice(None)
    ) -> Tensor:
        """Rounds numbers of the edited weights [m, c].

        Args:
            numbers: of all rows, or [n, c].
            places: the rows [n, c] that they are from, where they are not all.
            columns: which of the edited weights' columns they are from.
        """


class StoreColumns(Protocol):
    """A `Store` of columns that are decided on."""

    def __call__(self, numbers: Tensor, places: Tensor | None = None) -> Tensor:
        """See `Store`."""


def compensating_rows(basis: Tensor, per_direction: int = COMPENSATED_ROWS) -> Tensor:
    """Indices of the rows whose rounding `compensate` may choose, strongest first.

    Args:
        basis: B [H, k], what the stream reads.
        per_direction: at most so many rows for each of the k directions.
    """
    strength = basis.norm(dim=1)
    rows = strength.argsort(descending=True, stable=True)[: per_direction * basis.shape[1]]
    typical = strength.square().mean().sqrt()
    strong: Tensor = rows[strength[rows] >= WEAK_ROW * typical]
    return strong


def compensate(
    exact: Tensor,
    error: Tensor,
    basis: Tensor,
    store: Store,
    *,
    fine: int = FINE_ELEMENTS,
) -> Tensor:
    """Chooses roundings so that the stored columns write into the subspace what they should.

    Least noise under the constraint Bᵀ(stored - exact) = 0 is rounding of `exact - B a` for some a
    per column (its Lagrangian), which moves the elements nearest to a tie first; one step towards
    that a is made in all rows. What is left, single elements take: those of a column that move what
    is read by the smallest steps, coarser ones first, each rounded where it and all that come after
    it, if these could take any value, would leave least (nearest plane, Babai 1986). Only the last
    k elements' steps are left then.

    Of a Gaussian W in bfloat16, against nearest rounding, the leak is at most and the noise times

        H       k = 1           k = 4           k = 16
        256     1/1000 1.02     1/800  1.03     1/140  1.06
        576     1/1400 1.01     1/2000 1.02     1/500  1.03
        2048    1/3500 1.02     1/2500 1.01     1/2800 1.02

    (benchmarks/rounding.py). Few rows have few choices: within 1.03 times the noise, about 0.7 bits
    an element, while 1/500 of the leak takes 9 bits a direction. At H = 256, k = 16 that is 183
    bits for 143: enough in principle, but close, and such a choice is the closest vector of a
    lattice in many dimensions, for each column anew.

    Args:
        exact: [m, c], the edited weights before storing, in the rows that may be chosen.
        error: [k, c], Bᵀ(stored - exact) over all rows H, with `exact` rounded to nearest.
        basis: B [m, k] in these rows, same dtype; its columns need not be orthonormal.
        store: rounds numbers to representable ones.
        fine: elements per direction and column that are rounded one by one.

    Returns:
        [m, c]: what is to be stored.
    """
    nearest = store(exact)
    inverse = torch.linalg.pinv(basis.T @ basis, hermitian=True)
    stored = store(exact - basis @ (inverse @ error))
    left = error + basis.T @ (stored - nearest)
    count = min(fine * basis.shape[1], basis.shape[0])
    places = _smallest(stored * basis.norm(dim=1, keepdim=True), count)
    width = max(1, HELD_READS // max(1, count * basis.shape[1]))
    for start, end in column_ranges(exact.shape[1], width):
        one = (slice(None), slice(start, end))
        chosen = _one_by_one(
            exact[one].gather(0, places[one]),
            places[one],
            # as if the chosen elements had not been rounded yet
            left[one] - _read(basis, places[one], stored[one] - exact[one]),
            basis,
            partial(store, columns=one[1]),
        )
        stored[one] = stored[one].scatter(0, places[one], chosen)
    return stored


def _read(basis: Tensor, places: Tensor, moves: Tensor) -> Tensor:
    """[k, c]: what B reads of `moves` [m, c] at `places` [n, c]."""
    return basis.T @ torch.zeros_like(moves).scatter(0, places, moves.gather(0, places))


def _smallest(numbers: Tensor, count: int) -> Tensor:
    """Rows [count, c] of the smallest numbers of each column of [m, c], the smallest last."""
    # 16 bits order them well enough, and numpy's stable sort of 16-bit integers is a radix sort: it
    # takes a fifth of the time of `topk`, and numbers of equal size have one order everywhere
    sizes = numbers.abs().T.to(torch.bfloat16, memory_format=torch.contiguous_format)
    order = np.argsort(sizes.view(torch.int16).numpy(), axis=1, kind="stable")
    return torch.from_numpy(order[:, count - 1 :: -1].T.copy())


def _one_by_one(
    exact: Tensor,
    places: Tensor,
    error: Tensor,
    basis: Tensor,
    store: StoreColumns,
) -> Tensor:
    """Elements [n, c], of the rows `places` [n, c], rounded one after the other; coarse ones first.

    Args:
        exact: [n, c], before rounding.
        places: their rows of `basis`.
        error: [k, c], what B reads of all other roundings.
        basis: B [m, k].
        store: as `compensate` has it, of these columns.
    """
    reads = basis[places]  # [n, c, k]
    shares = _shares(reads, MOVE_COST * float(basis.square().sum(dim=1).mean()))
    left = error.T.contiguous()
    stored = torch.empty_like(exact)
    for i, number in enumerate(exact):
        wanted = number - (shares[i] * left).sum(dim=1)
        stored[i] = store(wanted[None], places[i : i + 1])[0]
        left = left.addcmul(reads[i], (stored[i] - number)[:, None])
    return stored


def _shares(reads: Tensor, cost: float) -> Tensor:
    """[n, c, k]: how far each element moves for an error, if all after it take their share, too.

    Element i minimises errorᵀ A error + move², with A⁻¹ = cost + Σ r rᵀ over the reads r of those
    after it: from the last to the first, A changes by one rank (Sherman and Morrison 1950).

    Args:
        reads: [n, c, k].
        cost: of a squared move, against a squared error.
    """
    _, columns, k = reads.shape
    inverse = (torch.eye(k, dtype=reads.dtype) / cost).repeat(columns, 1, 1)
    shares = torch.empty_like(reads)
    for i in reversed(range(len(reads))):
        seen = (inverse @ reads[i, :, :, None])[..., 0]
        shares[i] = seen / ((reads[i] * seen).sum(dim=1, keepdim=True) + 1)
        inverse.sub_(shares[i][:, :, None] * seen[:, None, :])
    return shares
