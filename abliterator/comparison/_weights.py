"""The differences between the weights of two checkpoints, computed from their files.

For every tensor that differs: how large the delta W' - W is, of what rank, and whether it is a
*removal*: D = -s Q Qᵀ W on the output side, or D = -s W Q Qᵀ on the input side, for an orthonormal
Q. A removal's Q can be read off D, so this needs no knowledge of how it was made.

The rank counts singular values above rounding, and is unknown (full) where more is left beside
them than rounding explains. Of W' with elements w', rounding leaves up to half a unit in the last
place, 2^(exponent(w') - bits), times the scale of FP8 and MXFP4: noise of standard deviation s =
unit / sqrt(12), larger where weights are. Its largest singular value is about the norm of the
largest row of s plus that of its largest column (Bandeira and van Handel 2016,
doi:10.1214/15-AOP1025). Of two formats, the noise is that of the coarser one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from abliterator.anatomy import Writer, anatomy_of
from abliterator.checkpoint import Checkpoint
from abliterator.comparison._beside import Setup, compute_alike
from abliterator.comparison._stored import Side, only_in
from abliterator.errors import AbliteratorError
from abliterator.record import TensorDelta, WeightDiff, WeightVerdict

if TYPE_CHECKING:
    import torch

# Ranks above this, or above half of what the shape allows, are not distinguished from full.
MAX_RANK = 32
# Compensated rounding moves elements by up to a whole unit, and float32 arithmetic adds a little.
_NOISE_MARGIN = 2.0
# How much of a delta a removal may leave unexplained beside rounding.
_MISFIT = 0.1
# Share of a delta's square that float32 arithmetic may leave unexplained.
_NEGLIGIBLE = 1e-5
# Singular value, over the largest, that float32 arithmetic and compensated rounding may leave.
_FAINT = 1e-5
# Eigenvalue of the mean projector from which on a direction is shared by the tensors.
_SHARED = 0.8


class Noise(NamedTuple):
    """Rounding noise of a tensor."""

    deviation: float  # of one element, root mean square
    spectral: float  # largest singular value


class _MeasuredDelta(NamedTuple):
    """A tensor's delta, and what the verdict over all tensors needs of it."""

    delta: TensorDelta
    basis: torch.Tensor | None = None  # [H, r] of a removal on the output side, orthonormal
    vector: torch.Tensor | None = None  # the delta itself, of a bias or a norm
    noise: Noise | None = None
    block: int | None = None  # index of its block, where the architecture is known


def diff_weights(base: Checkpoint, edited: Checkpoint) -> WeightDiff:
    """The delta of every tensor that differs, and the kind of edit that they make up together.

    One pair of tensors is in memory at a time.
    """
    sides = Side(base), Side(edited)
    shared = [name for name in sides[0].layouts if name in sides[1].layouts]
    writers = _writers(base)
    measured = []
    for name in shared:
        writer = writers.get(sides[0].stored_name(name))
        measurement = _measure(*sides, name, writing_axis=writer.axis if writer else 0)
        if measurement is not None:
            measured.append(measurement._replace(block=writer.layer if writer else None))
    deltas = tuple(measurement.delta for measurement in measured)
    only_base, only_edited = tuple(only_in(*sides)), tuple(only_in(*reversed(sides)))
    verdict, rank = _verdict(measured, complete=not (only_base or only_edited))
    if verdict == "identical" and not compute_alike(Setup(base), Setup(edited)):
        verdict = "config"
    return WeightDiff(
        compared=len(shared),
        identical=len(shared) - len(deltas),
        only_base=only_base,
        only_edited=only_edited,
        deltas=deltas,
        verdict=verdict,
        rank=rank,
    )


def _writers(base: Checkpoint) -> Mapping[str, Writer]:
    """The tensors that write the residual stream, by name; empty for an unknown architecture."""
    try:
        writers = anatomy_of(base.config).writers(base.shapes)
    except AbliteratorError:
        return {}
    return {writer.name: writer for writer in writers}


def _measure(base: Side, edited: Side, name: str, *, writing_axis: int) -> _MeasuredDelta | None:
    """The delta of one tensor; None where the bytes are the same."""
    if base.stored(name) == edited.stored(name):
        return None
    info = edited.checkpoint.tensors[edited.stored_name(name)]
    delta = TensorDelta(name=name, shape=info.shape, dtype=info.dtype)
    before, after = base.numbers(name), edited.numbers(name)
    if before is None or after is None or before.weight.shape != after.weight.shape:
        return _MeasuredDelta(delta)
    delta = delta.model_copy(update={"shape": tuple(after.weight.shape)})
    weight, difference = before.weight, after.weight - before.weight
    norm, size = float(difference.norm()), float(weight.norm())
    if not math.isfinite(norm):
        return _MeasuredDelta(delta)
    delta = delta.model_copy(update={"norm": norm, "relative": norm / size if size else None})
    noise = _noise(before.step.maximum(after.step))
    if norm == 0:
        return _MeasuredDelta(delta.model_copy(update={"rank": 0}))
    if difference.dim() == 1:
        rounded = norm <= _NOISE_MARGIN * noise.spectral
        delta = delta.model_copy(update={"rank": 0 if rounded else None})
        return _MeasuredDelta(delta, vector=difference, noise=noise)
    if difference.dim() != 2:
        return _MeasuredDelta(delta)
    return _measure_matrix(delta, weight, difference, noise, writing_axis=writing_axis)


def _noise(step: torch.Tensor) -> Noise:
    """Noise of rounding to numbers that are `step` apart, element by element."""
    variance = step.square() / 12
    edges = [float(variance.sum(dim=axis).max()) for axis in range(variance.dim())]
    return Noise(math.sqrt(float(variance.mean())), sum(map(math.sqrt, edges)))


def _measure_matrix(
    delta: TensorDelta,
    weight: torch.Tensor,
    difference: torch.Tensor,
    noise: Noise,
    *,
    writing_axis: int,
) -> _MeasuredDelta:
    """Rank of a delta [m, n], and whether it removes directions on one of its sides."""
    left, values, right = _singular(difference)
    rows, columns = difference.shape
    floor = max(_NOISE_MARGIN * noise.spectral, _FAINT * float(values[0]))
    rank = int((values > floor).sum())
    energy = float(difference.double().square().sum())
    rest = energy - float(values[:rank].double().square().sum())
    rounding = (_NOISE_MARGIN * noise.deviation) ** 2 * difference.numel()
    if rest > rounding + _NEGLIGIBLE * energy or rank > min(MAX_RANK, rows // 2, columns // 2):
        return _MeasuredDelta(delta)
    if rank == 0:
        return _MeasuredDelta(delta.model_copy(update={"rank": 0}))
    fits = [
        _removal(weight, difference, left[:, :rank], noise),
        _removal(weight.T, difference.T, right[:, :rank], noise),
    ]
    best = min(fits, key=lambda fit: fit.misfit)
    if best.misfit > 1:
        return _MeasuredDelta(delta.model_copy(update={"rank": rank}))
    side = "output" if fits.index(best) == writing_axis else "input"
    update = {"rank": rank, "side": side, "strength": best.strength}
    basis = best.basis if side == "output" else None
    return _MeasuredDelta(delta.model_copy(update=update), basis=basis)


def _singular(difference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest singular values of [m, n], a few more than MAX_RANK, with their vectors."""
    import torch

    with torch.random.fork_rng(devices=[]):  # svd_lowrank starts from a random matrix
        torch.manual_seed(0)
        count = min(MAX_RANK + 8, *difference.shape)
        left, values, right = torch.svd_lowrank(difference, q=count, niter=4)
    return left, values, right


class _Removal(NamedTuple):
    strength: float
    misfit: float  # over what is allowed
    basis: torch.Tensor


def _removal(
    weight: torch.Tensor, difference: torch.Tensor, basis: torch.Tensor, noise: Noise
) -> _Removal:
    """How well D = -s Q Qᵀ W fits for the best s; only along Q, where noise is least."""
    along, written = basis.T @ difference, basis.T @ weight
    size = float(written.square().sum())
    strength = -float((written * along).sum()) / size if size else 0.0
    misfit = float((along + strength * written).norm())
    allowed = _MISFIT * float(along.norm()) + _NOISE_MARGIN * noise.deviation * math.sqrt(
        along.numel()
    )
    return _Removal(strength, misfit / allowed, basis)


def _verdict(measured: list[_MeasuredDelta], *, complete: bool) -> tuple[WeightVerdict, int | None]:
    """The kind of edit that all deltas make up, and the rank of the subspace that they share."""
    if not complete:
        return "other", None
    if not measured:
        return "identical", None
    changed = [measurement for measurement in measured if measurement.delta.rank != 0]
    matrices = [measurement for measurement in changed if measurement.vector is None]
    if any(
        measurement.delta.norm is None or len(measurement.delta.shape) > 2
        for measurement in changed
    ):
        return "other", None
    if not changed:
        return "rounding", None
    if any(measurement.delta.rank is None for measurement in matrices) or not matrices:
        return "full_rank", None
    basis = _shared_basis([measurement.basis for measurement in matrices])
    if basis is not None and all(_lies_in(measurement, basis) for measurement in changed):
        return "directional", basis.shape[1]
    rank = _rank_by_block(changed)
    if rank is not None:
        return "directional_by_block", rank
    return "low_rank", max(measurement.delta.rank or 0 for measurement in matrices)


def _rank_by_block(changed: list[_MeasuredDelta]) -> int | None:
    """The rank of what each block's writers lose, where every block has one subspace for them."""
    blocks = {measurement.block for measurement in changed}
    if None in blocks or len(blocks) < 2:
        return None
    ranks = set()
    for block in blocks:
        in_block = [measurement for measurement in changed if measurement.block == block]
        basis = _shared_basis(
            [measurement.basis for measurement in in_block if measurement.vector is None]
        )
        if basis is None or not all(_lies_in(measurement, basis) for measurement in in_block):
            return None
        ranks.add(basis.shape[1])
    return ranks.pop() if len(ranks) == 1 else None


def _shared_basis(bases: list[torch.Tensor | None]) -> torch.Tensor | None:
    """[H, k]: the directions that all removals have in common; None if some tensor has others."""
    import torch

    present = [basis for basis in bases if basis is not None]
    if not present or len(present) < len(bases) or len({b.shape[0] for b in present}) > 1:
        return None
    # The squares of these are the eigenvalues of the mean projector: 1 for what all share.
    stacked = torch.cat(present, dim=1) / math.sqrt(len(present))
    left, values, _ = torch.linalg.svd(stacked, full_matrices=False)
    shared = left[:, values.square() > _SHARED]
    return shared if shared.shape[1] == max(basis.shape[1] for basis in present) else None


def _lies_in(measurement: _MeasuredDelta, basis: torch.Tensor) -> bool:
    """Whether the delta of a vector, if it is one, lies in the subspace as a bias's would."""
    vector = measurement.vector
    if vector is None:
        return True
    if len(vector) != basis.shape[0]:
        return False
    rest = float((vector - basis @ (basis.T @ vector)).norm())
    rounding = measurement.noise.spectral if measurement.noise else 0.0
    return rest <= _MISFIT * float(vector.norm()) + _NOISE_MARGIN * rounding
