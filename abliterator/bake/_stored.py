"""The edit of one tensor's stored bytes, panel by panel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

from abliterator.anatomy import Writer
from abliterator.bake._experts import parts_edited
from abliterator.bake._plan import EditSettings, PlannedEdit
from abliterator.checkpoint import Checkpoint
from abliterator.formats import (
    FORMATS,
    format_of,
    mxfp4_blocks,
    mxfp4_numbers,
    mxfp4_rounded,
    mxfp4_scales,
)

if TYPE_CHECKING:
    from torch import Tensor

    from abliterator.subspace import Removal

# Elements of one panel: small enough for tens of megabytes in all, large enough that the loop over
# panels is free.
PANEL_ELEMENTS = 1 << 19


def edit_stored(
    buffer: memoryview,
    edit: PlannedEdit,
    removal: Removal,
    settings: EditSettings,
    scale: Tensor | None = None,
) -> float | None:
    """Edits the stored bytes of one tensor in place.

    Args:
        buffer: all bytes of the tensor.
        edit: what the bytes are.
        removal: of the subspace, through the gains of the writer.
        settings: how to round, and whether to keep column norms.
        scale: of its blocks [rows / block, columns / block], for formats that have them.

    Returns:
        The leak |Bᵀ W'| / |Bᵀ W| measured on the bytes as stored (B = D Q, D the gains, or Q where
        there are none), of the chosen experts alone where not all are edited; None if W wrote
        nothing into the subspace to begin with.
    """
    change_panels = _edit_packed if edit.packed else _edit_panels
    before = after = 0.0
    for wrote, writes in change_panels(buffer, edit, removal, settings, scale):
        before += wrote
        after += writes
    return (after / before) ** 0.5 if before > 0 else None


def _edit_panels(
    buffer: memoryview,
    edit: PlannedEdit,
    removal: Removal,
    settings: EditSettings,
    scale: Tensor | None,
) -> Iterator[tuple[float, float]]:
    fmt = format_of(edit.info.dtype, edit.info.name)
    change = _Change(removal.to(fmt.compute_dtype), edit, settings, fmt.rounded)
    scales = None if scale is None else next(residual_first(scale, edit.writer))
    whole = fmt.view(buffer, edit.info.shape)
    edited = parts_edited(whole, edit.experts)
    for matrix in chain.from_iterable(residual_first(part, edit.writer) for part in edited):
        for start, panel in panels(matrix):
            one = None if scales is None else _panel_scale(panel, scales, start, edit)
            stored, wrote, writes = change.apply(panel.to(fmt.compute_dtype), one)
            panel.copy_(stored)
            yield wrote, writes


def _edit_packed(
    buffer: memoryview,
    edit: PlannedEdit,
    removal: Removal,
    settings: EditSettings,
    scale: Tensor | None,
) -> Iterator[tuple[float, float]]:
    """MXFP4: blocks [expert, H, b, 16] of 32 numbers, exponents [expert, H, b]."""
    import torch

    if scale is None:
        raise ValueError(f"{edit.info.name} is packed and comes without scales")
    change = _Change(removal.to(torch.float32), edit, settings, mxfp4_rounded)
    experts = torch.frombuffer(buffer, dtype=torch.uint8).view(edit.info.shape)
    width = max(1, PANEL_ELEMENTS // (32 * experts.shape[1]))
    chosen = range(len(experts)) if edit.experts is None else edit.experts
    for blocks, exponents in ((experts[expert], scale[expert]) for expert in chosen):
        for start in range(0, blocks.shape[1], width):
            part = blocks[:, start : start + width]
            one = mxfp4_scales(exponents[:, start : start + width])
            stored, wrote, writes = change.apply(mxfp4_numbers(part), one)
            part.copy_(mxfp4_blocks(stored))
            yield wrote, writes


def residual_first(tensor: Tensor, writer: Writer) -> Iterator[Tensor]:
    """Views [H, c] of a stored tensor: one, or one per expert; the residual stream is axis 0."""
    if tensor.ndim == 1:
        yield tensor[:, None]
    elif tensor.ndim == 3 and writer.axis == 1:
        yield from tensor
    else:  # [out, in], or the other way round with all experts' rows together
        yield tensor if writer.axis == 0 else tensor.flatten(0, -2).T


def read_scale(checkpoint: Checkpoint, edit: PlannedEdit) -> Tensor | None:
    """The block scales of a planned tensor, or None where its format has none."""
    import torch

    if edit.scale is None:
        return None
    if not edit.packed:
        return read_vector(checkpoint, edit.scale)
    data = bytearray(checkpoint.read(edit.scale))
    return torch.frombuffer(data, dtype=torch.uint8).view(edit.info.shape[:-1])


def read_vector(checkpoint: Checkpoint, name: str) -> Tensor:
    """A small tensor of the checkpoint in float64: a gain, or block scales."""
    import torch

    info = checkpoint.tensors[name]
    fmt = FORMATS[info.dtype]
    return fmt.view(bytearray(checkpoint.read(name)), info.shape).to(torch.float64)


def panels(matrix: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Views [H, c] of a matrix [H, n] with the first column of each."""
    width = max(1, PANEL_ELEMENTS // matrix.shape[0])
    for start in range(0, matrix.shape[1], width):
        yield start, matrix[:, start : start + width]


def _panel_scale(panel: Tensor, scales: Tensor, start: int, edit: PlannedEdit) -> Tensor:
    """What each stored number of a panel [H, c] is multiplied by: [H, c] float32."""
    import torch

    rows, columns = edit.block if edit.writer.axis == 0 else reversed(edit.block)
    row = torch.arange(panel.shape[0]) // rows
    column = (start + torch.arange(panel.shape[1])) // columns
    return scales[row[:, None], column[None, :]].float()


class _Change:
    """The edit of one tensor, applied to its panels.

    `rounded` takes numbers in units of their scales to the nearest that can be stored.
    """

    def __init__(
        self,
        removal: Removal,
        edit: PlannedEdit,
        settings: EditSettings,
        rounded: Callable[[Tensor], Tensor],
    ) -> None:
        from abliterator.subspace import compensating_rows

        self._removal = removal
        self._strength = edit.strength
        # a bias is no matrix with columns that scale what was read: it has no norm to keep
        self._keeps_norms = settings.norm == "column" and edit.writer.kind == "weight"
        self._rounded = rounded
        compensates = settings.rounding == "compensated"
        self._rows = compensating_rows(removal.read) if compensates else None

    def apply(self, stored: Tensor, scale: Tensor | None) -> tuple[Tensor, float, float]:
        """Edits and rounds numbers [H, c] in units of `scale`; `stored` itself is used up.

        Returns:
            What is to be stored, and what was and is written into the subspace, squared.
        """
        from abliterator.subspace import keep_column_norms

        read = self._removal.read
        exact = stored if scale is None else stored.mul_(scale)
        lengths = exact.norm(dim=0) if self._keeps_norms else None
        wrote = self._removal.remove(exact, self._strength)
        if lengths is not None:
            exact = keep_column_norms(exact, lengths)
        result = self._rounded(exact if scale is None else exact / scale)
        writes = read.T @ (result if scale is None else result * scale)
        if self._rows is not None:
            writes = self._compensate(exact, result, scale, writes)
        return result, _square(wrote), _square(writes)

    def _compensate(
        self, exact: Tensor, result: Tensor, scale: Tensor | None, writes: Tensor
    ) -> Tensor:
        """Rounds the rows of `result` that compensate once more; returns what it then writes."""
        from abliterator.subspace import compensate

        rows, read = self._rows, self._removal.read
        scales = None if scale is None else scale[rows]

        def store(numbers: Tensor, places: Tensor | None) -> Tensor:
            if scales is None:
                return self._rounded(numbers)
            units = scales if places is None else scales.gather(0, places)
            return self._rounded(numbers / units) * units

        error = writes - read.T @ exact
        before = result[rows] if scales is None else result[rows] * scales
        after = compensate(exact[rows], error, read[rows], store)
        result[rows] = after if scales is None else self._rounded(after / scales)
        return writes + read[rows].T @ (after - before)


def _square(writes: Tensor) -> float:
    return float(writes.double().square().sum())
