"""Leak of a tensor into the removed subspace, measured again from stored bytes.

To be independent of the edit this shares with it only how bytes become numbers (`formats`, which
tests compare with the loaders' own decoding): columns in float64, and the gains of the norms that
follow multiplied out.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from abliterator.anatomy import Anatomy, Writer, anatomy_of
from abliterator.checkpoint import Checkpoint, TensorInfo
from abliterator.errors import CheckpointError
from abliterator.formats import Layout, format_of

if TYPE_CHECKING:
    from torch import Tensor

PANEL_ELEMENTS = 1 << 21  # elements of a tensor that are float64 at once


def leak_meter(base: Checkpoint, subspace: Path | None) -> LeakMeter | None:
    """The `LeakMeter` for a subspace file; None without one, and where it holds no subspace."""
    if subspace is None:
        return None
    from abliterator.directions import load_subspace
    from abliterator.subspace import is_by_writer

    basis = load_subspace(subspace).basis
    return None if is_by_writer(basis) else LeakMeter(base, basis)


def require_blocks(basis: Tensor, anatomy: Anatomy) -> None:
    """Raises CheckpointError for a subspace a block, of a model with another number of them.

    And for pairs (U, V), which are no subspace.
    """
    if basis.ndim == 4:
        raise CheckpointError(
            "The file holds an edit for each module that writes (U and V), and no subspace that "
            "all lost, whose leak or strength could be measured. `abliterator verify` computes its "
            "tensors again; to measure a direction, give a file that holds one."
        )
    if basis.ndim == 3 and len(basis) != anatomy.n_layers:
        raise CheckpointError(
            f"There is a subspace for each of {len(basis)} blocks, and the model has "
            f"{anatomy.n_layers}: it was made for another model. Give the subspace of this run."
        )


def gain_of(checkpoint: Checkpoint, writer: Writer) -> Tensor:
    """D as a column [H, 1], or [1, 1] where there are none: the gains that follow, in float64."""
    import torch

    gain = torch.ones(1, 1, dtype=torch.float64)
    for norm in writer.gains:
        info, data = checkpoint.tensors[norm], bytearray(checkpoint.read(norm))
        stored = format_of(info.dtype, norm).view(data, info.shape).double()
        gain = gain * (stored[:, None] + writer.gain_offset)
    return gain


class LeakMeter:
    """Measures the writers of one base model against Q [H, k], or [L, H, k]: one a block.

    Raises:
        CheckpointError: for a subspace of each block of a model that has another number of them.
    """

    def __init__(self, base: Checkpoint, basis: Tensor) -> None:
        anatomy = anatomy_of(base.config)
        require_blocks(basis, anatomy)
        self._base = base
        self._basis = basis.double()
        self._storage = anatomy.storage
        self._writers = {writer.name: writer for writer in anatomy.writers(base.shapes)}

    def leak(
        self,
        info: TensorInfo,
        before: bytearray,
        after: bytearray,
        experts: tuple[int, ...] | None = None,
        *,
        dequantized: bool = False,
    ) -> float | None:
        """|Qᵀ D W'| / |Qᵀ D W|, D the gains that follow; None if W wrote nothing there.

        Args:
            info: the base's tensor.
            before: its bytes.
            after: those of the edited one.
            experts: those alone are measured; None for the whole tensor.
            dequantized: whether the edited one is plain numbers, of a tensor that was quantised.

        Raises:
            CheckpointError: if the tensor does not write the residual stream, or the subspace is
                that of another model.
        """
        writer, reads = self._writer(info.name), self.reads(info.name)
        layout, axis = self._storage.layout(info.name, self._base.tensors), writer.axis
        squared_before = self._squared(before, layout, axis, reads, experts)
        if dequantized:
            layout, axis = layout.dense, layout.dense_axis(axis)
        squared_after = self._squared(after, layout, axis, reads, experts)
        return (squared_after / squared_before) ** 0.5 if squared_before > 0 else None

    def reads(self, name: str) -> Tensor:
        """D Q [H, k], float64: projects a writer's output, through the gains, on the subspace.

        Raises:
            CheckpointError: if the tensor does not write the residual stream, or belongs to no
                block, where each has a subspace of its own.
        """
        writer = self._writer(name)
        return self._basis_of(writer) * gain_of(self._base, writer)

    def _writer(self, name: str) -> Writer:
        if name not in self._writers:
            raise CheckpointError(
                f"{name} was edited, but it does not write the residual stream of this model; "
                "only tensors that do were expected. Build the checkpoint again."
            )
        return self._writers[name]

    def _basis_of(self, writer: Writer) -> Tensor:
        """Q [H, k] of the subspace that was removed from this writer."""
        if self._basis.ndim == 2:
            return self._basis
        if writer.layer < 0:
            raise CheckpointError(
                f"{writer.name} was edited, but it belongs to no block, and each block has a "
                "subspace of its own. Give the subspace that this checkpoint was made with."
            )
        return self._basis[writer.layer]

    def _squared(
        self,
        data: bytearray,
        layout: Layout,
        axis: int,
        reads: Tensor,
        experts: tuple[int, ...] | None,
    ) -> float:
        """‖(D Q)ᵀ W‖² (Frobenius) of a stored tensor, `reads` being D Q."""
        scales = layout.scales_from(self._base.read)
        total = 0.0
        for matrix in layout.matrices(data, axis, scales, experts):
            if matrix.shape[0] != reads.shape[0]:
                raise CheckpointError(
                    f"The subspace has {reads.shape[0]} dimensions, and {layout.name} writes "
                    f"{matrix.shape[0]}: it was made for another model. Give the subspace of this "
                    "run."
                )
            for start, stop in matrix.ranges(PANEL_ELEMENTS):
                columns = matrix.decoded(start, stop).double()
                total += float((reads.T @ columns).square().sum())
        return total
