"""The edit of one tensor's stored bytes, panel by panel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from abliterator.anatomy import Writer
from abliterator.bake._plan import EditSettings, PlannedEdit
from abliterator.checkpoint import Checkpoint
from abliterator.formats import (
    FORMATS,
    format_of,
    mxfp4_blocks,
    mxfp4_neighbours,
    mxfp4_numbers,
    mxfp4_scales,
    neighbours,
)

if TYPE_CHECKING:
    from torch import Tensor

    from abliterator.subspace import Removal

# Elements of one panel: small enough for tens of megabytes in all, large enough that the loop over
# panels is free.
PANEL_ELEMENTS = 1 << 21


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
        there are none), or None if W wrote nothing into the subspace to begin with.
    """
    panels = _edit_packed if edit.packed else _edit_panels
    before = after = 0.0
    for wrote, writes in panels(buffer, edit, removal, settings, scale):
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
    through = removal.to(fmt.compute_dtype)
    scales = None if scale is None else next(residual_first(scale, edit.writer))
    for matrix in residual_first(fmt.view(buffer, edit.info.shape), edit.writer):
        for start, panel in _panels(matrix):
            one = _panel_scale(panel, scales, start, edit).to(fmt.compute_dtype)
            yield _edit_panel(panel, one, edit, through, settings)


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
    through = removal.to(torch.float32)
    experts = torch.frombuffer(buffer, dtype=torch.uint8).view(edit.info.shape)
    width = max(1, PANEL_ELEMENTS // (32 * experts.shape[1]))
    for blocks, exponents in zip(experts, scale, strict=True):
        for start in range(0, blocks.shape[1], width):
            part = blocks[:, start : start + width]
            one = mxfp4_scales(exponents[:, start : start + width])
            stored, wrote, writes = _edited(
                mxfp4_numbers(part), one, edit, through, settings, mxfp4_neighbours
            )
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


def _panels(matrix: Tensor) -> Iterator[tuple[int, Tensor]]:
    width = max(1, PANEL_ELEMENTS // matrix.shape[0])
    for start in range(0, matrix.shape[1], width):
        yield start, matrix[:, start : start + width]


def _panel_scale(panel: Tensor, scales: Tensor | None, start: int, edit: PlannedEdit) -> Tensor:
    """What each stored number of a panel is multiplied by: [H, c], or [1, 1] where nothing is."""
    import torch

    if scales is None:
        return torch.ones(1, 1)
    rows, columns = edit.block if edit.writer.axis == 0 else reversed(edit.block)
    row = torch.arange(panel.shape[0]) // rows
    column = (start + torch.arange(panel.shape[1])) // columns
    return scales[row[:, None], column[None, :]]


def _edit_panel(
    panel: Tensor, scale: Tensor, edit: PlannedEdit, removal: Removal, settings: EditSettings
) -> tuple[float, float]:
    """Edits one panel [H, c]; returns what it wrote into the subspace before and after, squared."""
    fmt = FORMATS[edit.info.dtype]
    stored, wrote, writes = _edited(
        panel.to(fmt.compute_dtype), scale, edit, removal, settings, partial(neighbours, fmt=fmt)
    )
    panel.copy_(stored)
    return wrote, writes


def _edited(
    stored: Tensor,
    scale: Tensor,
    edit: PlannedEdit,
    removal: Removal,
    settings: EditSettings,
    either: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, float, float]:
    """Numbers [H, c] in units of `scale`, edited and rounded; and the squared writes."""
    from abliterator.subspace import ablate_through, keep_column_norms, squared_write

    original = stored * scale
    exact = ablate_through(original, removal, edit.strength)
    # a bias is no matrix with columns that scale what was read: it has no norm to keep
    if settings.norm == "column" and edit.writer.kind == "weight":
        exact = keep_column_norms(exact, original)
    rounded = _rounded(exact, scale, removal, settings.rounding, either)
    writes = squared_write(rounded * scale, removal.read)
    return rounded, squared_write(original, removal.read), writes


def _rounded(
    exact: Tensor,
    scale: Tensor,
    removal: Removal,
    rounding: str,
    either: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """The edited panel [H, c] in units of `scale`, every number representable."""
    import torch

    from abliterator.subspace import compensate

    nearest, other = either(exact / scale)
    if rounding == "nearest":
        return nearest
    choice = compensate(nearest * scale, other * scale, exact, removal.read)
    return torch.where(choice, other, nearest)
