"""Compensated rounding: stored weights that write as little as possible into the subspace.

Of a Gaussian W in bfloat16, against nearest rounding, the leak is at most and the noise times

    H       k = 1           k = 4           k = 16
    256     1/1300 1.01     1/1300 1.02     1/190  1.05
    576     1/1900 1.01     1/3000 1.01     1/650  1.03
    2048    1/4500 1.02     1/3500 1.01     1/3500 1.01

(perf/rounding.py). Where few rows have few choices, hardly more can be had: at H = 256, k =
16 every choice without a leak, whoever finds it, makes 1.029 times the noise at least, by the
dual bound of the Lagrangian, which takes mixtures of roundings for choices; at H = 128 1.059.
Nor does a longer search help much: 64 sequences followed through all elements find 1/240 at 1.035
times the noise at H = 256, for thirty times the work.
"""

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

# Of these, so many per direction are tried with several roundings each, and so many sequences of
# roundings are followed at once: the error that the last elements leave remains.
LAST_ELEMENTS = 2
FOLLOWED = 4

# A row that reads less than this share of the typical one would have to move far for little.
WEAK_ROW = 0.25

# Weight of a squared move against a squared error that it cancels, in typical squared reads of a
# row: just enough that no element moves far to cancel what it hardly reads.
MOVE_COST = 1e-4

# Numbers that the rounding one by one holds at once: columns beyond that wait.
HELD_READS = 1 << 20

# Columns that are sorted at once: their order takes twice the memory of the numbers.
SORTED_COLUMNS = 64


class Store(Protocol):
    """Rounds numbers to the nearest that the storage format represents, in their dtype."""

    def __call__(
        self, numbers: Tensor, places: Tensor | None = None, columns: slice = slice(None)
    ) -> Tensor:
        """The nearest representable numbers, in the shape of `numbers`.

        Args:
            numbers: [m, c] of all rows of the edited weights, or [n, c] of some.
            places: row of each number [n, c], where they are not of all rows.
            columns: columns of the edited weights that they are from.
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
    steps: int = 1,
) -> Tensor:
    """Rounds columns so that their errors cancel in the subspace.

    Least noise under the constraint Bᵀ(stored - exact) = 0 is rounding of `exact - B a` for some a
    per column (its Lagrangian), which moves the elements nearest to a tie first; one step towards
    that a is made in all rows, or several where numbers lie on a coarse grid already and a small
    step moves none of them. The remaining error is cancelled by single elements: those of a
    column that move what is read by the smallest steps, coarser ones first, each rounded where it
    and all that come after it, if these could take any value, would leave least (nearest plane,
    Babai 1986). Only the last k elements' steps are left then; of the last 2 k, therefore, both
    neighbours of a near tie are tried, and the best few sequences so far are kept (K-best, a sphere
    decoder's breadth-first search).

    Args:
        exact: [m, c], the edited weights before storing, in the rows that may be chosen.
        error: [k, c], Bᵀ(stored - exact) over all rows H, with `exact` rounded to nearest.
        basis: B [m, k] in these rows, same dtype; its columns need not be orthonormal.
        store: rounds numbers to representable ones.
        fine: elements per direction and column that are rounded one by one.
        steps: towards a, of which the one that leaves least is taken for each column.

    Returns:
        [m, c]: what is to be stored.
    """
    nearest = store(exact)
    inverse = torch.linalg.pinv(basis.T @ basis, hermitian=True)
    moves = inverse @ error
    stored = store(exact - basis @ moves)
    remaining = error + basis.T @ (stored - nearest)
    left = remaining
    for _ in range(steps - 1):
        moves = moves + inverse @ left
        moved = store(exact - basis @ moves)
        left = error + basis.T @ (moved - nearest)
        better = left.square().sum(dim=0) < remaining.square().sum(dim=0)
        stored, remaining = stored.where(~better, moved), remaining.where(~better, left)
    count = min(fine * basis.shape[1], basis.shape[0])
    # numbers of one power of two have one step
    powers = (stored / torch.frexp(stored).mantissa).nan_to_num(0.0)
    places = _smallest(powers * basis.norm(dim=1, keepdim=True), count)
    width = max(1, HELD_READS // max(1, count * basis.shape[1]))
    for start, end in column_ranges(exact.shape[1], width):
        one = (slice(None), slice(start, end))
        chosen = _one_by_one(
            exact[one].gather(0, places[one]),
            places[one],
            # as if the chosen elements had not been rounded yet
            remaining[one] - _read(basis, places[one], stored[one] - exact[one]),
            basis,
            partial(store, columns=one[1]),
        )
        stored[one] = stored[one].scatter(0, places[one], chosen)
    return stored


def _read(basis: Tensor, places: Tensor, moves: Tensor) -> Tensor:
    """[k, c]: Bᵀ of `moves` [m, c], restricted to the rows `places` [n, c]."""
    return basis.T @ torch.zeros_like(moves).scatter(0, places, moves.gather(0, places))


def _smallest(numbers: Tensor, count: int) -> Tensor:
    """Rows [count, c] of the smallest numbers of each column of [m, c], the smallest last."""
    rows = torch.empty(count, numbers.shape[1], dtype=torch.int64)
    for start, end in column_ranges(numbers.shape[1], SORTED_COLUMNS):
        # 16 bits order them well enough, and numpy's stable sort of 16-bit integers is a radix
        # sort: it takes a fifth of the time of `topk`, and ties have one order everywhere
        part = numbers[:, start:end].abs().T
        sizes = part.to(torch.bfloat16, memory_format=torch.contiguous_format)
        order = np.argsort(sizes.view(torch.int16).numpy(), axis=1, kind="stable")
        rows[:, start:end] = torch.from_numpy(order[:, count - 1 :: -1].T.copy())
    return rows


def _one_by_one(
    exact: Tensor, places: Tensor, error: Tensor, basis: Tensor, store: StoreColumns
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
    shares, weights = _shares(reads, MOVE_COST * float(basis.square().sum(dim=1).mean()))
    remaining = error.T.contiguous()
    stored = torch.empty_like(exact)
    first = max(0, len(exact) - LAST_ELEMENTS * basis.shape[1])
    for i, number in enumerate(exact[:first]):
        target = number - (shares[i] * remaining).sum(dim=1)
        stored[i] = store(target[None], places[i : i + 1])[0]
        remaining = remaining.addcmul(reads[i], (stored[i] - number)[:, None])
    last = slice(first, None)
    stored[last] = _best(
        exact[last], places[last], remaining, reads[last], shares[last], weights[last], store
    )
    return stored


def _best(
    exact: Tensor,
    places: Tensor,
    remaining: Tensor,
    reads: Tensor,
    shares: Tensor,
    weights: Tensor,
    store: StoreColumns,
) -> Tensor:
    """Elements [n, c] rounded to the nearest or to the neighbour beyond, whatever leaves less.

    Args:
        exact: [n, c], before rounding.
        places: [n, c], as `store` expects them.
        remaining: [c, k], what B reads of all other roundings.
        reads: [n, c, k].
        shares: [n, c, k], as `_shares` has them.
        weights: [n, c], of squared distances from what an element should be.
        store: as `_one_by_one` has it.
    """
    errors = remaining[None]  # [followed, c, k]
    costs = torch.zeros_like(exact[:1])
    chosen = torch.empty_like(exact)[:, None]  # [n, followed, c]
    for i, number in enumerate(exact):
        target = number - (shares[i] * errors).sum(dim=2)
        rows = places[i].expand_as(target)
        nearest = store(target, rows)
        # as far on the other side: another number than the nearest only where it was a near tie
        beyond = store(2 * target - nearest, rows)
        candidates = torch.cat([nearest, beyond])
        added = (candidates - torch.cat([target, target])).square() * weights[i]
        added[len(nearest) :][nearest == beyond] = torch.inf
        total = torch.cat([costs, costs]) + added
        costs, kept = total.topk(min(FOLLOWED, len(total)), dim=0, largest=False)
        parent = kept % len(errors)
        numbers = candidates.gather(0, kept)
        errors = errors.gather(0, parent[..., None].expand(-1, -1, errors.shape[2]))
        errors = errors.addcmul(reads[i], (numbers - number)[..., None])
        chosen = chosen.gather(1, parent.expand(len(exact), -1, -1))
        chosen[i] = numbers
    best = costs.argmin(dim=0)
    return chosen.gather(1, best.expand(len(exact), 1, -1))[:, 0]


def _shares(reads: Tensor, cost: float) -> tuple[Tensor, Tensor]:
    """How far each element moves to cancel an error, if all after it move by their shares, too.

    Element i minimises errorᵀ A error + move², with A⁻¹ = cost + Σ r rᵀ over the reads r of those
    after it: from the last to the first, A changes by one rank (Sherman and Morrison 1950).

    Args:
        reads: [n, c, k].
        cost: of a squared move, against a squared error.

    Returns:
        The shares [n, c, k], and what is lost [n, c] for each squared distance from such a move.
    """
    _, columns, k = reads.shape
    inverse = (torch.eye(k, dtype=reads.dtype) / cost).repeat(columns, 1, 1)
    shares, weights = torch.empty_like(reads), torch.empty_like(reads[..., 0])
    for i in reversed(range(len(reads))):
        projected = (inverse @ reads[i, :, :, None])[..., 0]
        weights[i] = (reads[i] * projected).sum(dim=1) + 1
        shares[i] = projected / weights[i][:, None]
        inverse.sub_(shares[i][:, :, None] * projected[:, None, :])
    return shares, weights
