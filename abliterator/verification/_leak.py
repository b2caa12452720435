"""What a tensor writes into the removed subspace, measured anew from stored bytes.

This shares no code with the edit: the matrix is unrolled whole, in float64, and its block scales
and the gains of the norms that follow it are multiplied out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from abliterator.anatomy import Writer, anatomy_of
from abliterator.checkpoint import Checkpoint, TensorInfo
from abliterator.errors import CheckpointError
from abliterator.formats import SCALE_SUFFIX, format_of, mxfp4_numbers, mxfp4_scales

if TYPE_CHECKING:
    from torch import Tensor

_PANEL_ELEMENTS = 1 << 21  # elements of a tensor that are float64 at once


class LeakMeter:
    """Measures the writers of one base model against Q [H, k], or [L, H, k]: one a block.

    Raises:
        CheckpointError: for a subspace of each block of a model that has another number of them.
    """

    def __init__(self, base: Checkpoint, basis: Tensor) -> None:
        anatomy = anatomy_of(base.config)
        if basis.ndim == 3 and len(basis) != anatomy.n_layers:
            raise CheckpointError(
                f"There is a subspace for each of {len(basis)} blocks, and the model has "
                f"{anatomy.n_layers}: it was made for another model. Give the subspace of this run."
            )
        self._base = base
        self._basis = basis.double()
        self._writers: dict[str, Writer] = {
            writer.name: writer for writer in anatomy.writers(base.shapes)
        }

    def leak(
        self,
        info: TensorInfo,
        before: bytearray,
        after: bytearray,
        experts: tuple[int, ...] | None = None,
    ) -> float | None:
        """|Qᵀ D W'| / |Qᵀ D W|, D the gains that follow; None if W wrote nothing there.

        Args:
            info: the tensor.
            before: its bytes in the base.
            after: its bytes as edited.
            experts: those alone are measured; None for the whole tensor.

        Raises:
            CheckpointError: if the tensor does not write the residual stream, or the subspace is
                that of another model.
        """
        writer, read = self._writer(info.name), self.reads(info.name)
        was, is_now = (self._squared(data, info, writer, read, experts) for data in (before, after))
        return (is_now / was) ** 0.5 if was > 0 else None

    def reads(self, name: str) -> Tensor:
        """D Q [H, k], float64: what of a writer's output lands in the subspace.

        Raises:
            CheckpointError: if the tensor does not write the residual stream, or belongs to no
                block, where each has a subspace of its own.
        """
        writer = self._writer(name)
        return self._removed_from(writer) * self._gain(writer)

    def _writer(self, name: str) -> Writer:
        if name not in self._writers:
            raise CheckpointError(
                f"{name} was edited, but it does not write the residual stream of this model; "
                "only tensors that do were expected. Build the checkpoint again."
            )
        return self._writers[name]

    def _removed_from(self, writer: Writer) -> Tensor:
        """[H, k]: the subspace that this writer should have lost."""
        if self._basis.ndim == 2:
            return self._basis
        if writer.layer < 0:
            raise CheckpointError(
                f"{writer.name} was edited, but it belongs to no block, and each block has a "
                "subspace of its own. Give the subspace that this checkpoint was made with."
            )
        return self._basis[writer.layer]

    def _gain(self, writer: Writer) -> Tensor:
        """[H, 1]: what multiplies the write on its way into the stream."""
        import torch

        gain = torch.ones(self._basis.shape[-2], 1, dtype=torch.float64)
        for name in writer.gains:
            gain = gain * (self._stored(name)[:, None] + writer.gain_offset)
        return gain

    def _stored(self, name: str) -> Tensor:
        info = self._base.tensors[name]
        data = bytearray(self._base.read(name))
        return format_of(info.dtype, name).view(data, info.shape).double()

    def _squared(
        self,
        data: bytearray,
        info: TensorInfo,
        writer: Writer,
        read: Tensor,
        experts: tuple[int, ...] | None,
    ) -> float:
        if writer.packed and writer.kind == "weight":
            return self._squared_packed(data, info, read, experts)
        fmt = format_of(info.dtype, info.name)
        weight = fmt.view(data, info.shape)
        if fmt.scaled:
            weight = weight.double() * self._scales(info)
        if experts is not None:
            weight = weight[list(experts)]
        # [H, c]; of a bias one column, of experts the columns of all
        columns = weight[:, None] if weight.ndim == 1 else weight.movedim(writer.axis, 0).flatten(1)
        if columns.shape[0] != read.shape[0]:
            raise CheckpointError(
                f"The subspace has {read.shape[0]} dimensions, and {info.name} writes "
                f"{columns.shape[0]}: it was made for another model. Give the subspace of this run."
            )
        width = max(1, _PANEL_ELEMENTS // columns.shape[0])
        panels = columns.split(width, dim=1)  # type: ignore[no-untyped-call]
        return sum(float((read.T @ panel.double()).square().sum()) for panel in panels)

    def _squared_packed(
        self, data: bytearray, info: TensorInfo, read: Tensor, experts: tuple[int, ...] | None
    ) -> float:
        """The same of MXFP4: blocks [expert, H, b, 16] beside exponents [expert, H, b]."""
        import torch

        stored = bytearray(self._base.read(info.name.removesuffix("_blocks") + "_scales"))
        blocks = torch.frombuffer(data, dtype=torch.uint8).view(info.shape)
        exponents = torch.frombuffer(stored, dtype=torch.uint8).view(info.shape[:-1])
        return sum(
            float((read.T @ (mxfp4_numbers(b) * mxfp4_scales(e)).double()).square().sum())
            for i, (b, e) in enumerate(zip(blocks, exponents, strict=True))
            if experts is None or i in experts
        )

    def _scales(self, info: TensorInfo) -> Tensor:
        """The scale of every element, of formats that keep one for each block."""
        scales = self._stored(info.name + SCALE_SUFFIX)
        for axis, block in enumerate(self._base.config["quantization_config"]["weight_block_size"]):
            scales = scales.repeat_interleave(block, dim=axis).narrow(axis, 0, info.shape[axis])
        return scales
