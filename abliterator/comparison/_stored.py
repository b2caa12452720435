"""The tensors of a checkpoint decoded to float32, from plain and from quantised formats."""

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
_SMALLEST_STEP = {"F8_E4M3": 2.0**-9, "U8": 0.5}  # U8 is FP4
_INTEGERS = ("I8", "I32")  # packed or not, they are one unit apart


class Numbers(NamedTuple):
    """A tensor in float32, and the distance between representable numbers at each element."""

    weight: torch.Tensor
    step: torch.Tensor


@dataclass(frozen=True)
class Side:
    """One of the checkpoints that are compared; scales belong to the tensor that they scale.

    Tensors go by the names that they have in a checkpoint that is not quantised.
    """

    checkpoint: Checkpoint

    @cached_property
    def layouts(self) -> dict[str, Layout | None]:
        """Layout of every tensor but scales, by that name; None where it cannot be decoded."""
        layouts = {name: self._layout(name) for name in self.checkpoint.tensors}
        scales = {
            name for layout in layouts.values() if layout is not None for name in layout.scales
        }
        return {
            layout.dense.name if layout is not None and layout.quantized else name: layout
            for name, layout in layouts.items()
            if name not in scales
        }

    def stored_name(self, name: str) -> str:
        """The name of a tensor in the weight file."""
        layout = self.layouts[name]
        return name if layout is None else layout.name

    def owner_of(self, name: str) -> str:
        """Name of the weight that a tensor of scales belongs to; of any other tensor, its own."""
        return self._storage.owner(name) if self._storage is not None else name

    def stored(self, name: str) -> tuple[object, ...]:
        """Format, shape, bytes and scales of a tensor, to compare it across checkpoints."""
        layout, info = self.layouts[name], self.checkpoint.tensors[self.stored_name(name)]
        units = () if layout is None else layout.scales_from(self.checkpoint.read)
        return info.dtype, info.shape, self.checkpoint.read(info.name), units

    def numbers(self, name: str) -> Numbers | None:
        """A tensor decoded, in the shape that it has where it is not quantised."""
        import torch

        layout = self.layouts[name]
        if layout is None:
            return None
        data = bytearray(self.checkpoint.read(layout.name))
        if not layout.quantized:
            weight = FORMATS[layout.dtype].view(data, layout.shape).float()
            return Numbers(weight, _steps(weight, layout.dtype))
        axis = max(0, min(1, len(layout.shape) - 2))
        scales = layout.scales_from(self.checkpoint.read)
        matrices = list(layout.matrices(data, axis, scales))
        parts = [_decoded(matrix, layout.dtype) for matrix in matrices]
        if layout.dense_axis(axis) != axis:  # the plain tensor has the stream's axis last
            parts = [Numbers(weight.T, step.T) for weight, step in parts]
        shape = layout.dense.shape
        weight, step = (torch.stack(pieces).reshape(shape) for pieces in zip(*parts, strict=True))
        return Numbers(weight, step)

    @cached_property
    def _storage(self) -> Storage | None:
        try:
            return storage_of(self.checkpoint.config)
        except AbliteratorError:
            return None

    def _layout(self, name: str) -> Layout | None:
        if self._storage is None:
            tensors = self.checkpoint.tensors
            return Storage().layout(name, tensors) if tensors[name].dtype in FORMATS else None
        try:
            return self._storage.layout(name, self.checkpoint.tensors)
        except AbliteratorError:
            return None


def only_in(side: Side, other: Side) -> Iterator[str]:
    """Names of tensors that `other` lacks, without those that only a quantised checkpoint needs."""
    for name in side.layouts:
        owner = side.owner_of(name)
        if name not in other.layouts and not (owner != name and owner in other.layouts):
            yield side.stored_name(name)


def _decoded(matrix: Matrix, dtype: str) -> Numbers:
    """All columns of a matrix that is stored in units of scales, decoded to float32."""
    import torch

    weights, steps = [], []
    for start, stop in matrix.ranges(matrix.shape[0] * matrix.shape[1]):
        numbers, units = matrix.get(start, stop)
        step = _steps(numbers, dtype)
        steps.append(step if units is None else step * units.scale)
        weights.append(numbers if units is None else units.weights_(numbers))
    return Numbers(torch.cat(weights, dim=1).float(), torch.cat(steps, dim=1).float())


def _steps(numbers: torch.Tensor, dtype: str) -> torch.Tensor:
    """A unit in the last place of each number of a format; 0 for a plain 0."""
    import torch

    if dtype in _INTEGERS:
        return torch.ones_like(numbers)
    _, exponent = torch.frexp(numbers)
    step = torch.exp2((exponent - _BITS[dtype]).float())
    if dtype in _SMALLEST_STEP:
        return step.clamp_min(_SMALLEST_STEP[dtype])
    return torch.where(numbers == 0, 0.0, step)
