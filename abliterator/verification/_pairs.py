"""Tensors of modules with an edit of their own, computed again: W' = W - s U Vᵀ W.

U and V are those of the checkpoint's directions.safetensors, which other programs read. To be
independent of the edit this shares with it only how bytes become numbers and back (`formats`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from abliterator.anatomy import Writer, anatomy_of
from abliterator.checkpoint import Checkpoint
from abliterator.errors import DirectionError
from abliterator.formats import Matrix
from abliterator.record import TensorEdit
from abliterator.verification._findings import DIRECTIONS, EDITS, Findings
from abliterator.verification._leak import PANEL_ELEMENTS

if TYPE_CHECKING:
    from torch import Tensor

    from abliterator.directions import PublishedDirections, Site

FACTORS = 2.0**-22  # of |A| |B|: rounding of two factors in float32, and a margin
# Rounding may be compensated: in wide models that is a few hundredths more noise than rounding to
# nearest, and 1.7 times as much at 32 numbers a column.
_NOISE = 2.0
# In formats of four bits that are kept, rounding to nearest undoes the edit, and so is near to it:
# compensated rounding has up to 2.2 times as much noise.
_COARSE_NOISE = 4.0
# Two measurements of one change or noise differ by the rounding of the sums behind them.
_SAME = 0.05
_NOTHING = 1e-5


def is_rounding(apart: float, rounding: float, factors: float, *, coarse: bool = False) -> bool:
    """Whether stored weights are those of an edit but for rounding.

    Args:
        apart: |W' - E| (Frobenius), E the exact edit; NaN is no rounding.
        rounding: |E rounded to nearest - E|.
        factors: |A| |B| of the product A B that was added to W.
        coarse: whether numbers are stored in units of scales.
    """
    return apart <= (_COARSE_NOISE if coarse else _NOISE) * rounding + FACTORS * factors


def pair_meter(
    base: Checkpoint, checkpoint: Path, named: Mapping[str, TensorEdit], findings: Findings
) -> PairMeter | None:
    """The `PairMeter` of a checkpoint; None where no tensor has a pair of its own.

    A fault for tensors that are said to have lost a subspace beside those that have pairs, and
    where the file of directions cannot be read, which gives None.
    """
    others = [name for name, edit in named.items() if edit.subspace != "writer"]
    if len(others) == len(named):
        return None
    findings.faults += [
        f"{EDITS} says that {name} lost a subspace, where other tensors have edits of their own."
        for name in others
    ]
    from abliterator.directions import load_directions

    try:
        return PairMeter(base, load_directions(checkpoint / DIRECTIONS))
    except DirectionError as error:
        findings.fault(f"The edited tensors cannot be computed again. {error}")
        return None


@dataclass
class _Squares:
    """Squared norms (Frobenius) over the panels of one tensor."""

    apart: float = 0.0
    rounding: float = 0.0
    reads: float = 0.0
    change: float = 0.0
    weight: float = 0.0

    def add(self, source: Matrix, target: Matrix, pair: tuple[Tensor, Tensor]) -> None:
        """Adds a matrix [H, n] as it was and as it is stored; `pair` is s U and V, float64."""
        take, read = pair
        for start, stop in source.ranges(PANEL_ELEMENTS):
            weight = source.decoded(start, stop).double()
            reads = read.T @ weight
            exact = weight - take @ reads
            stored = target.decoded(start, stop).double()
            self.apart += _square(stored - exact)
            self.rounding += _square(_rounded(target, start, stop, exact) - exact)
            self.reads += _square(reads)
            self.change += _square(stored - weight)
            self.weight += _square(weight)


class PairMeter:
    """Computes the tensors of modules with U and V again, of one base model."""

    def __init__(self, base: Checkpoint, directions: PublishedDirections) -> None:
        anatomy = anatomy_of(base.config)
        self._base, self._storage, self._tensors = base, anatomy.storage, directions.tensors
        self._sites = {site.module: site for site in directions.sites}
        self._writers = {writer.name: writer for writer in anatomy.writers(base.shapes)}

    def compare(
        self, edit: TensorEdit, before: bytearray, after: bytearray, findings: Findings
    ) -> None:
        """Compares the stored bytes of an edited tensor with what its pair makes of the base's.

        Args:
            edit: its entry of edits.json.
            before: bytes of the base's tensor.
            after: of the edited one.
            findings: of the file; gets the distance, and a fault where it is no rounding.
        """
        writer, site = self._writer_and_site(edit, findings)
        if writer is None or site is None:
            return
        squares = _Squares()
        take, read = (self._tensors[name].double() for name in (site.take, site.read))
        sources, targets = self._matrices(edit, writer.axis, before, after)
        for source, target in zip(sources, targets, strict=True):
            if source.shape[0] != len(take):
                findings.fault(f"{DIRECTIONS} has U and V of {len(take)} rows for {edit.name}.")
                return
            squares.add(source, target, (edit.strength * take, read))
        _judge(edit, squares, float(take.norm()), findings)

    def _writer_and_site(
        self, edit: TensorEdit, findings: Findings
    ) -> tuple[Writer | None, Site | None]:
        """The writer and the site of an edit; a fault where one is missing or says another edit."""
        writer = self._writers.get(edit.name)
        site = None if writer is None else self._sites.get(writer.module)
        if writer is None or site is None:
            findings.fault(f"{EDITS} names {edit.name}, and {DIRECTIONS} has no U and V for it.")
            return None, None
        shapes = [tuple(self._tensors[name].shape) for name in (site.read, site.take)]
        if site.strength != edit.strength or any(
            len(shape) != 2 or shape[1] != edit.k for shape in shapes
        ):
            findings.fault(
                f"{EDITS} says that {edit.name} has an edit of rank {edit.k} and strength "
                f"{edit.strength:g}; in {DIRECTIONS} U and V are {list(shapes[1])} and "
                f"{list(shapes[0])}, the strength {site.strength:g}."
            )
            return None, None
        return writer, site

    def _matrices(
        self, edit: TensorEdit, axis: int, before: bytearray, after: bytearray
    ) -> tuple[Iterator[Matrix], Iterator[Matrix]]:
        """The edited matrices of a tensor as the base has them, and as they are stored."""
        layout, read = self._storage.layout(edit.name, self._base.tensors), self._base.read
        scales = layout.scales_from(read)
        sources = layout.matrices(before, axis, scales, edit.experts)
        if edit.dequantized:
            layout, axis, scales = layout.dense, layout.dense_axis(axis), ()
        return sources, layout.matrices(after, axis, scales, edit.experts)


def _rounded(target: Matrix, start: int, stop: int, exact: Tensor) -> Tensor:
    """Exact weights [H, c], each rounded to the nearest that can be stored, in float64."""
    _, units = target.get(start, stop)
    numbers = exact.to(target.compute)
    if units is None:
        return target.rounded(numbers).double()
    return units.weights_(target.rounded(units.numbers(numbers))).double()


def _judge(edit: TensorEdit, squares: _Squares, length: float, findings: Findings) -> None:
    """What the norms of one tensor say; `length` is |U|."""
    apart, rounding = squares.apart**0.5, squares.rounding**0.5
    factors = abs(edit.strength) * length * squares.reads**0.5
    coarse = edit.storage is not None and not edit.dequantized
    if not is_rounding(apart, rounding, factors, coarse=coarse):
        findings.fault(
            f"{edit.name}: what is stored is {apart:.1e} from W - s U Vᵀ W of the base and "
            f"{DIRECTIONS}; rounding explains {rounding:.1e}."
        )
    if rounding > 0:
        findings.apart.append(apart / rounding)
    size = squares.weight**0.5 or 1.0
    measured = {"change": (squares.change**0.5 / size, edit.change)}
    if edit.storage is not None:
        measured["noise"] = (apart / size, edit.noise)
    for name, (value, claimed) in measured.items():
        if claimed is None or not abs(value - claimed) <= max(_NOTHING, _SAME * claimed):
            findings.fault(
                f"{edit.name} has a {name} of {value:.2e} of its length, measured again; {EDITS} "
                f"says {'nothing of it' if claimed is None else format(claimed, '.2e')}."
            )


def _square(values: Tensor) -> float:
    return float(values.square().sum())
