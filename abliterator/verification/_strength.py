"""How strongly a subspace was removed from a checkpoint, whoever edited it: on its stored bytes.

A writer that was W (with its gains) and is W' has the effective strength s that fits
Qᵀ W' = (1 - s) Qᵀ W best: s = 1 - <Qᵀ W', Qᵀ W> / |Qᵀ W|² (Frobenius). 1 is removed, 0 left, and
above 1 the direction is inverted: the writer writes its opposite.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from abliterator.anatomy import Writer, anatomy_of
from abliterator.checkpoint import Checkpoint
from abliterator.errors import CheckpointError
from abliterator.formats import Matrix
from abliterator.record import EffectiveStrength
from abliterator.verification._leak import PANEL_ELEMENTS, gain_of, require_blocks

if TYPE_CHECKING:
    from torch import Tensor

_GROUP = 32  # columns: what shares a scale is never divided, in any format


@dataclass
class Overlap:
    """Sums over what was written before and after, from which a strength follows.

    Attributes:
        before: |Qᵀ w|².
        after: |Qᵀ w'|².
        product: <Qᵀ w', Qᵀ w>.
        change: |w' - w|².
        change_within: |Qᵀ (w' - w)|².
    """

    before: float = 0.0
    after: float = 0.0
    product: float = 0.0
    change: float = 0.0
    change_within: float = 0.0

    def add(self, basis: Tensor, before: Tensor, after: Tensor) -> None:
        """Adds columns [H, c] of float64, written before and after; `basis` is Q [H, k]."""
        old, new = basis.T @ before, basis.T @ after
        self.before += float(old.square().sum())
        self.after += float(new.square().sum())
        self.product += float((old * new).sum())
        self.change += float((after - before).square().sum())
        self.change_within += float((new - old).square().sum())

    def strength(self, component: str, layer: int) -> EffectiveStrength:
        """The strength and leak of a component of a block; None where nothing was written."""
        writes = self.before > 0
        return EffectiveStrength(
            component=component,
            layer=layer,
            strength=1 - self.product / self.before if writes else None,
            leak=(self.after / self.before) ** 0.5 if writes else None,
            change_within=self.change_within / self.change if self.change > 0 else None,
        )


def stored_strengths(
    base: Path,
    edited: Path,
    basis: Tensor,
    *,
    on_bytes: Callable[[int], None] | None = None,
) -> tuple[EffectiveStrength, ...]:
    """The effective strength of every block and component, from the weights of two checkpoints.

    Either may be stored in any format that abliterator reads, so it also measures what a
    quantisation left of an edit.

    Args:
        base: folder of the base model.
        edited: folder of the edited one.
        basis: Q [H, k], orthonormal, or [L, H, k] with one a block.
        on_bytes: called with the size of each of the edited checkpoint's writers when it is done.

    Raises:
        CheckpointError: for a damaged folder, for two models of other shapes, and for a subspace of
            another width.
        UnsupportedModel: for an architecture or a storage format that is not known.
    """
    before, after = _Writes(base), _Writes(edited)
    require_fit(basis, before.checkpoint)
    sums: defaultdict[tuple[int, str], Overlap] = defaultdict(Overlap)
    for key, writer in before.writers.items():
        other = after.writers.get(key)
        if other is None:
            raise CheckpointError(
                f"{edited} has no tensor for {writer.name}, which {base} has. The two are not of "
                "one architecture, or one is not whole: give the base that it was made from."
            )
        if basis.ndim == 3 and writer.layer < 0:
            continue  # it belongs to no block, and so to no subspace
        q = (basis if basis.ndim == 2 else basis[writer.layer]).double()
        overlap = sums[writer.layer, writer.component]
        pairs = zip(before.columns(writer), after.columns(other), strict=True)
        for old, new in pairs:
            if old.shape != new.shape:
                raise CheckpointError(
                    f"{writer.name} writes {list(old.shape)} numbers in {base} and "
                    f"{list(new.shape)} in {edited}. Give the base that it was made from."
                )
            overlap.add(q, old, new)
        if on_bytes is not None:
            on_bytes(after.checkpoint.tensors[other.name].nbytes)
    return tuple(sums[key].strength(key[1], key[0]) for key in sorted(sums))


def require_fit(basis: Tensor, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for a subspace of another width or number of blocks than a model's."""
    anatomy = anatomy_of(checkpoint.config)
    require_blocks(basis, anatomy)
    if basis.shape[-2] != anatomy.d_model:
        raise CheckpointError(
            f"The subspace has {basis.shape[-2]} dimensions, and {checkpoint.folder} writes "
            f"{anatomy.d_model}: it was made for another model."
        )


class _Writes:
    """What the writers of a checkpoint write: D W, D the gains that follow, in float64."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = Checkpoint.open(folder)
        anatomy = anatomy_of(self.checkpoint.config)
        self._storage, self._n_experts = anatomy.storage, anatomy.n_experts
        self.writers = {
            (writer.module, writer.kind, writer.expert): writer
            for writer in anatomy.writers(self.checkpoint.shapes)
            if writer.name in self.checkpoint.tensors
        }

    def columns(self, writer: Writer) -> Iterator[Tensor]:
        """Columns [H, c] of D W, some at a time."""
        gain = gain_of(self.checkpoint, writer)
        for matrix in self._matrices(writer):
            rows, columns = matrix.shape
            width = _GROUP * max(1, PANEL_ELEMENTS // (_GROUP * rows))
            for start in range(0, columns, width):
                yield matrix.decoded(start, min(start + width, columns)).double() * gain

    def _matrices(self, writer: Writer) -> Iterator[Matrix]:
        tensors = self.checkpoint.tensors
        layout = self._storage.layout(writer.name, tensors)
        scales = layout.scales_from(self.checkpoint.read)
        # one expert at a time, in whatever order of axes a format has them
        experts = tuple(range(self._n_experts)) if writer.fused or writer.packed else None
        return layout.matrices(
            bytearray(self.checkpoint.read(writer.name)), writer.axis, scales, experts
        )
