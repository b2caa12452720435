"""The tensors of a checkpoint as numbers, however they are stored: FP8 and MXFP4 decoded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from abliterator.checkpoint import Checkpoint
from abliterator.errors import AbliteratorError
from abliterator.formats import FORMATS, Layout, Matrix, Storage, storage_of

if TYPE_CHECKING:
    import torch

# Bits of the significand, the leading 1 included; and the smallest step, where there is one.
_BITS = {"BF16": 8, "F16": 11, "F32": 24, "F64": 53, "F8_E4M3": 4, "U8": 2}
_SMALLEST_STEP = {"F8_E4M3": 2.0**-9, "U8": 0.5}  # U8 is MXFP4


class Numbers(NamedTuple):
    """A tensor's numbers in float32, and how far apart the ones that can be stored lie there."""

    weight: torch.Tensor
    step: torch.Tensor


@dataclass(frozen=True)
class Side:
    """One of the checkpoints that are compared; scales belong to the tensor that they scale.

    A tensor is known by the name that it has where it is not quantised.
    """

    checkpoint: Checkpoint

    @cached_property
    def layouts(self) -> dict[str, Layout | None]:
        """Every tensor but scales, by that name; None where the numbers cannot be told."""
        found = {name: self._layout(name) for name in self.checkpoint.tensors}
        scales = {layout.scales for layout in found.values() if layout is not None}
        return {
            layout.dense.name if layout is not None and layout.quantized else name: layout
            for name, layout in found.items()
            if name not in scales
        }

    def stored_name(self, name: str) -> str:
        """Of a tensor, as the file has it."""
        layout = self.layouts[name]
        return name if layout is None else layout.name

    def belongs(self, name: str) -> str:
        """The tensor without which `name` means nothing, such as that of an input's scale."""
        return self._storage.owner(name) if self._storage is not None else name

    def stored(self, name: str) -> tuple[object, ...]:
        """What is the same in both checkpoints if the tensor is: format, shape and all bytes."""
        layout, info = self.layouts[name], self.checkpoint.tensors[self.stored_name(name)]
        scales = None if layout is None or layout.scales is None else layout.scales
        units = None if scales is None else self.checkpoint.read(scales)
        return info.dtype, info.shape, self.checkpoint.read(info.name), units

    def numbers(self, name: str) -> Numbers | None:
        """A tensor decoded, in the shape that it has where it is not quantised."""
        import torch

        layout = self.layouts[name]
        if layout is None:
            return None
        data = bytearray(self.checkpoint.read(layout.name))
        if layout.scales is None:
            weight = FORMATS[layout.dtype].view(data, layout.shape).float()
            return Numbers(weight, _steps(weight, layout.dtype))
        axis = max(0, min(1, len(layout.shape) - 2))
        matrices = list(layout.matrices(data, axis, self.checkpoint.read(layout.scales)))
        parts = [_decoded(matrix, layout.dtype) for matrix in matrices]
        if layout.dense_axis(axis) != axis:  # the plain tensor has the stream's axis last
            parts = [Numbers(weight.T, step.T) for weight, step in parts]
        shape = layout.dense.shape
        weight, step = (torch.stack(each).reshape(shape) for each in zip(*parts, strict=True))
        return Numbers(weight, step)

    @cached_property
    def _storage(self) -> Storage | None:
        try:
            return storage_of(self.checkpoint.config)
        except AbliteratorError:
            return None

    def _layout(self, name: str) -> Layout | None:
        if self._storage is None:
            return Storage().layout(name, self.checkpoint.tensors) if self._plain(name) else None
        try:
            return self._storage.layout(name, self.checkpoint.tensors)
        except AbliteratorError:
            return None

    def _plain(self, name: str) -> bool:
        return self.checkpoint.tensors[name].dtype in FORMATS


def only_in(side: Side, other: Side) -> Iterator[str]:
    """Tensors that the other has not, but for what a quantised one alone needs."""
    for name in side.layouts:
        owner = side.belongs(name)
        if name not in other.layouts and not (owner != name and owner in other.layouts):
            yield side.stored_name(name)


def _decoded(matrix: Matrix, dtype: str) -> Numbers:
    """All columns of a matrix that is stored in units of scales."""
    import torch

    weights, steps = [], []
    for start, stop in matrix.ranges(matrix.shape[0] * matrix.shape[1]):
        units, scale = matrix.get(start, stop)
        factor = 1.0 if scale is None else scale
        weights.append(units * factor)
        steps.append(_steps(units, dtype) * factor)
    return Numbers(torch.cat(weights, dim=1).float(), torch.cat(steps, dim=1).float())


def _steps(numbers: torch.Tensor, dtype: str) -> torch.Tensor:
    """A unit in the last place of each number of a format; 0 for a plain 0."""
    import torch

    _, exponent = torch.frexp(numbers)
    step = torch.exp2((exponent - _BITS[dtype]).float())
    if dtype in _SMALLEST_STEP:
        return step.clamp_min(_SMALLEST_STEP[dtype])
    return torch.where(numbers == 0, 0.0, step)
