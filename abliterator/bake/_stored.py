"""The edit of one tensor's stored bytes, panel by panel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from abliterator.bake._plan import PlannedEdit
from abliterator.checkpoint import Checkpoint
from abliterator.errors import DirectionError
from abliterator.files import damaged
from abliterator.formats import FORMATS, Matrix, Units
from abliterator.recipe import Edit

if TYPE_CHECKING:
    from torch import Tensor

    from abliterator.subspace import Removal, Store

# Elements of one panel: small enough for tens of megabytes in all, large enough that the loop over
# panels is free.
PANEL_ELEMENTS = 1 << 19

# Elements whose second rounding is deferred: it takes many small steps, which are made for all
# their columns at once.
DEFERRED_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class StoredEdit:
    """Leak and rounding noise of one tensor, measured on its stored bytes.

    Attributes:
        leak: |Bᵀ W'| / |Bᵀ W| (B = D Q, D the gains, or Q where there are none), or None if W wrote
            nothing there to begin with; of the chosen experts, where not all are edited. None of a
            writer with a pair of its own, which removes no subspace.
        change: |W' - W| / |W|, of a writer with a pair of its own.
        noise: |W' - E| / |W| with E the exact edit, of quantised tensors.
        noise_nearest: the same, had every number been rounded to its nearest.
    """

    leak: float | None
    noise: float | None = None
    noise_nearest: float | None = None
    change: float | None = None


def edit_stored(
    buffer: memoryview,
    edit: PlannedEdit,
    removal: Removal,
    settings: Edit,
    *,
    own_pair: bool = False,
    scales: Sequence[bytes] = (),
    out: memoryview | None = None,
    on_panel: Callable[[], None] = lambda: None,
) -> StoredEdit:
    """Edits the stored bytes of one tensor, and measures leak and rounding noise.

    Args:
        buffer: all bytes of the tensor.
        edit: the plan of this tensor.
        removal: of the subspace, through the gains of the writer.
        settings: how to round, and whether to keep column norms.
        own_pair: whether the removal is U and V of this writer, and of no subspace.
        scales: bytes of the tensors `layout.scales`, for formats that have them.
        out: where the edited bytes go, in the layout `edit.stored`; without it, in place.
        on_panel: called before each panel of columns; what it raises ends the edit.

    Raises:
        FileError: a number of the tensor is not finite, or too large to compute with.
        DirectionError: with a pair of its own, if a number would be stored that is not finite.
    """
    axis = edit.writer.axis
    sources = edit.layout.matrices(buffer, axis, scales, edit.experts)
    if out is None:
        pairs: Iterator[tuple[Matrix, Matrix]] = ((matrix, matrix) for matrix in sources)
    else:
        if edit.experts is not None and scales:
            edit.layout.dequantize(buffer, scales, out, on_panel)  # the other experts
        targets = edit.stored.matrices(out, edit.layout.dense_axis(axis), experts=edit.experts)
        pairs = zip(sources, targets, strict=True)
    sums = _Sums(own_pair=own_pair)
    for source, target in pairs:
        editor = _MatrixEditor(removal.to(source.compute), edit, settings, target, sums)
        for start, stop in source.ranges(PANEL_ELEMENTS):
            on_panel()
            editor.apply(source, start, stop)
        editor.finish()
    return sums.result(measured=edit.layout.quantized)


def read_vector(checkpoint: Checkpoint, name: str) -> Tensor:
    """A one-dimensional tensor of the checkpoint (a norm's gain) in float64."""
    import torch

    info = checkpoint.tensors[name]
    fmt = FORMATS[info.dtype]
    return fmt.view(bytearray(checkpoint.read(name)), info.shape).to(torch.float64)


@dataclass
class _Sums:
    """Squared norms (Frobenius), summed over the panels of one tensor."""

    own_pair: bool = False
    wrote: float = 0.0
    writes: float = 0.0
    size: float = 0.0
    noise: float = 0.0
    nearest: float = 0.0
    change: float = 0.0

    def result(self, *, measured: bool) -> StoredEdit:
        leak = (self.writes / self.wrote) ** 0.5 if self.wrote > 0 else None
        change = None
        if self.own_pair:
            leak, change = None, (self.change / self.size) ** 0.5 if self.size > 0 else 0.0
        if not measured or self.size == 0:
            return StoredEdit(leak, change=change)
        noise, nearest = (self.noise / self.size) ** 0.5, (self.nearest / self.size) ** 0.5
        return StoredEdit(leak, noise, nearest, change)


class _DeferredPanel(NamedTuple):
    """The rows of a panel whose compensated rounding is deferred to a larger batch of columns.

    Attributes:
        start: its first column.
        exact: [m, c], before rounding.
        stored: [m, c], each rounded to the nearest.
        weight: [m, c], before the edit; None where its change is not measured.
        units: of what is stored [m, c], if there are any.
        writes: Bᵀ W' [k, c] of all rows as they are stored; Uᵀ W' of a pair.
        error: what of `writes` comes from rounding.
    """

    start: int
    exact: Tensor
    stored: Tensor
    weight: Tensor | None
    units: Units | None
    writes: Tensor
    error: Tensor


class _MatrixEditor:
    """Edits one stored matrix, panel by panel."""

    def __init__(
        self,
        removal: Removal,
        edit: PlannedEdit,
        settings: Edit,
        target: Matrix,
        sums: _Sums,
    ) -> None:
        from abliterator.subspace import compensating_rows

        self._removal, self._edit, self._sums = removal, edit, sums
        # a bias is no matrix with columns that scale what was read: it has no norm to keep
        self._keeps_norms = settings.norm == "column" and edit.writer.kind == "weight"
        self._target = target
        self._measures = edit.layout.quantized
        compensates = settings.rounding == "compensated"
        # what rounding must not change: of a pair, the edit, which lies in the span of U
        self._kept = removal.take if sums.own_pair else removal.read
        self._rows = compensating_rows(self._kept) if compensates else None
        self._deferred: list[_DeferredPanel] = []

    def apply(self, source: Matrix, start: int, stop: int) -> None:
        """Edits and stores columns `start` to `stop` of `source`, rounded to nearest."""
        from abliterator.subspace import keep_column_norms

        sums = self._sums
        exact, units = source.get(start, stop)
        if units is not None:
            units.weights_(exact)
        before = exact.clone() if sums.own_pair else None
        if self._measures or sums.own_pair:
            sums.size += _square(exact)
        lengths = exact.norm(dim=0) if self._keeps_norms else None
        wrote = _square(self._removal.remove(exact, self._edit.strength))
        if not isfinite(wrote):
            raise damaged(
                Path(self._edit.info.file),
                f"{self._edit.info.name} has numbers that are infinite, NaN or too large to "
                "compute with, or a gain that its output goes through has",
            )
        sums.wrote += wrote
        if lengths is not None:
            exact = keep_column_norms(exact, lengths)
        units = units if self._target is source else None
        numbers = self._target.rounded(exact if units is None else units.numbers(exact))
        self._target.put(start, numbers)
        stored = numbers if units is None else units.weights_(numbers)
        if before is not None:
            sums.change += self._require_finite(_square(stored - before))
        writes = self._kept.mT @ stored
        if self._measures:
            nearest = _square(stored - exact)
            sums.nearest += nearest
            sums.noise += nearest
        if self._rows is None:
            sums.writes += _square(writes)
            return
        rows, error = self._rows, writes - self._kept.mT @ exact
        of_rows = None if units is None else units.rows(rows)
        weight = None if before is None else before[rows]
        self._deferred.append(
            _DeferredPanel(start, exact[rows], stored[rows], weight, of_rows, writes, error)
        )
        if sum(panel.exact.numel() for panel in self._deferred) >= DEFERRED_ELEMENTS:
            self.finish()

    def _require_finite(self, square: float) -> float:
        """`square`, of numbers that are stored."""
        if isfinite(square):
            return square
        raise DirectionError(
            f"{self._edit.info.name} would have numbers that are not finite, stored as "
            f"{self._edit.stored.dtype}; its file stays as it was. Give a larger `tuning.ridge` or "
            "`tuning.kl_weights`, which keep the edit near its start."
        )

    def finish(self) -> None:
        """Rounds the rows of the deferred panels again, so that they compensate the error."""
        from abliterator.subspace import compensate

        panels, self._deferred = self._deferred, []
        if self._rows is None or not panels:
            return
        basis, rounded = self._kept[self._rows], self._target.rounded
        exact = _joined([panel.exact for panel in panels])
        before = _joined([panel.stored for panel in panels])
        units = _joined_units([panel.units for panel in panels if panel.units is not None])
        error = _joined([panel.error for panel in panels])
        steps = self._target.steps
        after = compensate(exact, error, basis, _store_in(units, rounded), steps=steps)
        numbers = after
        if units is not None:
            numbers = rounded(units.numbers(after))
            after = units.weights_(numbers.clone())  # what is measured is what is stored
        widths = [panel.exact.shape[1] for panel in panels]
        edges = accumulate(widths, initial=0)
        for panel, (start, stop) in zip(panels, pairwise(edges), strict=True):
            self._target.put(panel.start, numbers[:, start:stop], self._rows)
        writes = _joined([panel.writes for panel in panels])
        if self._sums.own_pair:
            weight = _joined([panel.weight for panel in panels if panel.weight is not None])
            moved = _square(after - weight) - _square(before - weight)
            self._sums.change += self._require_finite(moved)
        self._sums.writes += _square(writes + basis.T @ (after - before))
        if self._measures:
            self._sums.noise += _square(after - exact) - _square(before - exact)


def _joined(parts: list[Tensor]) -> Tensor:
    """Concatenates columns; without a copy where there is one part."""
    import torch

    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _joined_units(parts: list[Units]) -> Units | None:
    """Concatenates the units of columns; None for none."""
    if not parts:
        return None
    zeros = [part.zero for part in parts if part.zero is not None]
    return Units(_joined([part.scale for part in parts]), _joined(zeros) if zeros else None)


def _store_in(units: Units | None, rounded: Callable[[Tensor], Tensor]) -> Store:
    """The `Store` for `compensate`: rounds in units [m, c] if there are any."""

    def store(
        numbers: Tensor, places: Tensor | None = None, columns: slice = slice(None)
    ) -> Tensor:
        if units is None:
            return rounded(numbers)
        of_part = units.columns(columns) if places is None else units.at(places, columns)
        return of_part.weights_(rounded(of_part.numbers(numbers)))

    return store


def _square(values: Tensor) -> float:
    return float(values.double().square().sum())
