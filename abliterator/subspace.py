"""Pure linear algebra on tensors: moments, orthonormal bases, and the edit of a writer.

Tensors in, tensors out: no files, no layers by name, no models, no devices chosen. Weights come as
*panels* [H, c]: H runs over the residual stream, the c columns over whatever the matrix reads, so
one formula serves every layout.

    basis = orthonormal_basis(directions)            # [k, H] -> Q [H, k]
    edited = ablate(panel, basis, strength=1.0)      # W' = W - s Q Qᵀ W

Shapes: N prompts, L layers, H = d_model, k rank, c columns of a panel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from abliterator.errors import DirectionError

# Unit directions nearer than this to the span of the others are dependent: activations are captured
# in float32 or less, so what is left of one below 1e-5 is rounding, and QR would turn that noise
# into a direction of its own.
DEPENDENT_BELOW = 1e-5

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

# Lambda in S = 1 / ((g / median|g|)² + lambda²): how far the edit through a gain g may grow where g
# is near 0. Towards 0 the edited output is nearest to the ideal one and the change of W largest; in
# [0.3, 1] both are within a few percent of their best on Gemma 3.
GAIN_FLOOR = 0.5


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


class Moments:
    """Accumulates `MomentSet` batch by batch in float64 (Chan et al. 1979, pairwise update)."""

    def __init__(self, n_layers: int, d_model: int) -> None:
        self._n = 0
        self._mean = torch.zeros(n_layers, d_model, dtype=torch.float64)
        self._m2 = torch.zeros(n_layers, d_model, dtype=torch.float64)

    def update(self, vectors: Tensor) -> None:
        """Adds a batch [N, L, H] of any floating dtype and device.

        Raises:
            DirectionError: if a value is not finite; it names the residual layer.
        """
        batch = vectors.detach().to("cpu", torch.float64)
        if batch.shape[1:] != self._mean.shape:
            raise ValueError(
                f"vectors are {tuple(batch.shape)}, expected [N, *{tuple(self._mean.shape)}]"
            )
        finite = torch.isfinite(batch).all(dim=2).all(dim=0)
        if not finite.all():
            layer = int((~finite).nonzero()[0].item()) + 1
            raise DirectionError(
                f"The residual stream at layer {layer} holds NaN or infinite values. The model "
                f"overflows in this dtype, or its weights are damaged; try `--dtype float32`."
            )
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
    vectors = directions.detach().to("cpu", torch.float64)
    k, d_model = vectors.shape
    called = names or [f"direction {i}" for i in range(k)]
    if k > d_model:
        raise DirectionError(f"{k} directions cannot be independent in {d_model} dimensions.")
    lengths = vectors.norm(dim=1)
    for name, length in zip(called, lengths.tolist(), strict=True):
        if not 0 < length < float("inf"):
            raise DirectionError(
                f"The direction of {name} has length {length}: nothing separates the two prompt "
                f"sets there. Choose another layer, or check that the sets differ."
            )
    q, r = torch.linalg.qr((vectors / lengths[:, None]).T)
    left = r.diagonal()
    for i, name in enumerate(called):
        if abs(float(left[i])) < DEPENDENT_BELOW:
            raise DirectionError(
                f"The direction of {name} lies in the span of {', '.join(called[:i])} (only "
                f"{abs(float(left[i])):.1e} of its length lies outside). Stack other layers."
            )
    basis: Tensor = q * left.sign()
    return basis


def orthonormal_columns(columns: Tensor) -> Tensor:
    """Q [H, k] with the span of `columns` [H, k], or of each block's in [L, H, k]; float64.

    Raises:
        DirectionError: as `orthonormal_basis`; the column is named, and its block.
    """
    names = [f"column {i}" for i in range(columns.shape[-1])]
    if columns.ndim == 2:
        return orthonormal_basis(columns.T, names)
    blocks = enumerate(columns)
    each = [orthonormal_basis(own.T, [f"block {i}, {name}" for name in names]) for i, own in blocks]
    return torch.stack(each)


def basis_of_block(basis: Tensor, block: int) -> Tensor:
    """Q [H, k] of one block, from a basis [H, k] that all share or one for each [L, H, k]."""
    return basis if basis.ndim == 2 else basis[block]


def ablate(panel: Tensor, basis: Tensor, strength: float) -> Tensor:
    """W' = W - s Q Qᵀ W, on the output side (Arditi et al. 2024, eq. 5, for rank k).

    Args:
        panel: W [H, c].
        basis: Q [H, k], orthonormal, same dtype.
        strength: s; 1 removes the subspace, 0 changes nothing.

    Returns:
        [H, c], a new tensor.
    """
    return torch.addmm(panel, basis, basis.T @ panel, alpha=-strength)


@dataclass(frozen=True)
class Removal:
    """The edit W' = W - s A Bᵀ W with Bᵀ A = 1, so that s = 1 leaves Bᵀ W' = 0.

    Attributes:
        take: A [H, k], what is subtracted.
        read: B [H, k], what the stream would see of W: Q, or D Q up to a factor where gains follow.
    """

    take: Tensor
    read: Tensor

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Removal:
        """The same, rounded."""
        return Removal(self.take.to(device, dtype), self.read.to(device, dtype))

    def remove(self, panel: Tensor, strength: float) -> Tensor:
        """Edits W [H, c], of the dtype of this removal, in place.

        Returns:
            Bᵀ W [k, c], what it wrote before.
        """
        wrote = self.read.T @ panel
        panel.addmm_(self.take, wrote, alpha=-strength)
        return wrote


def removal_of_basis(basis: Tensor, gain: Tensor | None = None) -> Removal:
    """How Q is removed from a write that a norm's gain multiplies before it is added.

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
    store: Callable[[Tensor, Tensor | None], Tensor],
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
        store: rounds numbers to representable ones. Its second argument is None for numbers [m, c]
            at their places, or the rows [n, c] of `exact` that numbers [n, c] are from.
        fine: elements per direction and column that are rounded one by one.

    Returns:
        [m, c]: what is to be stored.
    """
    nearest = store(exact, None)
    inverse = torch.linalg.pinv(basis.T @ basis, hermitian=True)
    stored = store(exact - basis @ (inverse @ error), None)
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
            store,
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
    store: Callable[[Tensor, Tensor | None], Tensor],
) -> Tensor:
    """Elements [n, c], of the rows `places` [n, c], rounded one after the other; coarse ones first.

    Args:
        exact: [n, c], before rounding.
        places: their rows of `basis`.
        error: [k, c], what B reads of all other roundings.
        basis: B [m, k].
        store: as `compensate` has it.
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


def squared_write(panel: Tensor, basis: Tensor) -> float:
    """‖Qᵀ W‖² (Frobenius) of a panel [H, c], in float64: what it writes into the subspace."""
    return float((basis.T @ panel).double().square().sum())


def cosine_matrix(directions: Tensor) -> Tensor:
    """Cosines between the rows of `directions` [L, H]: [L, L] float64; a zero row gives zeros."""
    unit = torch.nn.functional.normalize(directions.double(), dim=1)
    return unit @ unit.T


def column_ranges(columns: int, width: int) -> list[tuple[int, int]]:
    """Half-open ranges that cut `columns` into panels of at most `width`."""
    edges = [*range(0, columns, width), columns]
    return list(pairwise(edges))
