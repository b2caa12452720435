"""Layouts: how the bytes of one tensor hold its numbers, plain or in units of scales."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from abliterator.formats._numbers import (
    F8_E4M3,
    FORMATS,
    MXFP4_GROUP,
    Format,
    Units,
    mxfp4_blocks,
    mxfp4_numbers,
    mxfp4_rounded,
    mxfp4_scales,
    scales_of,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Shape = tuple[int, ...]
Bytes = memoryview | bytearray
Experts = tuple[int, ...] | None

DEQUANTIZED_ELEMENTS = 1 << 19  # numbers decoded at once while dequantizing

DENSE = "BF16"
"""Format of a quantised tensor that is dequantized."""


class Matrix(ABC):
    """A stored matrix [H, n], the residual stream first; `put` writes into the tensor's bytes.

    Attributes:
        compute: dtype of calculations.
        rounded: rounds numbers, in their units, to the nearest that can be stored.
        shape: (H, n).
        steps: of compensated rounding before it goes on number by number.
        together: columns that are stored together, of which `get` takes all or none.
    """

    steps = 1
    together = 1
    compute: torch.dtype
    rounded: Callable[[Tensor], Tensor]
    shape: tuple[int, int]

    @abstractmethod
    def get(self, start: int, stop: int) -> tuple[Tensor, Units | None]:
        """Copies of columns [H, c] in `compute`, and their units; None if it has none."""

    @abstractmethod
    def put(self, start: int, numbers: Tensor, rows: Tensor | None = None) -> None:
        """Stores numbers, representable in their units, from column `start` on.

        Args:
            start: first column.
            numbers: [H, c], or [m, c] of some rows.
            rows: indices [m] of these rows.
        """

    def ranges(self, elements: int) -> Iterator[tuple[int, int]]:
        """Ranges of columns that `get` takes at once, of about so many elements each."""
        rows, columns = self.shape
        width = self.together * max(1, elements // (self.together * rows))
        for start in range(0, columns, width):
            yield start, min(start + width, columns)

    def decoded(self, start: int, stop: int) -> Tensor:
        """The weights of columns [H, c], in `compute`."""
        numbers, units = self.get(start, stop)
        return numbers if units is None else units.weights_(numbers)


@dataclass(frozen=True)
class Layout(ABC):
    """How one tensor is stored.

    Attributes:
        name: of the tensor.
        dtype: as in its header.
        shape: as in its header.
        scales: names of the tensors that its numbers mean nothing without: scales, and what else
            the format has, in the order in which `matrices` takes their bytes.
    """

    name: str
    dtype: str
    shape: Shape
    scales: tuple[str, ...] = ()

    kind = "plain"  # its name in `MEASURED` and in messages

    @property
    def quantized(self) -> bool:
        """Whether its numbers are in units of scales."""
        return bool(self.scales)

    def scales_from(self, read: Callable[[str], bytes]) -> tuple[bytes, ...]:
        """The bytes of the tensors `scales`, in their order; `read` gives those of one by name."""
        return tuple(read(name) for name in self.scales)

    def fault(self, scales: Sequence[bytes]) -> str | None:
        """What is wrong with the bytes of the tensors `scales`, as a clause; None for nothing."""
        return None

    @property
    def dense(self) -> PlainLayout:
        """The layout of the same numbers without scales."""
        return PlainLayout(self.name, DENSE, self.shape)

    def dense_axis(self, axis: int) -> int:
        """The axis of `dense` that corresponds to `axis`."""
        return axis

    def dequantize(
        self,
        buffer: Bytes,
        scales: Sequence[bytes],
        out: Bytes,
        on_panel: Callable[[], None] = lambda: None,
    ) -> None:
        """Writes the numbers in the layout `dense` to `out`, each rounded to the nearest.

        `on_panel` is called before each of the parts in which that is done.
        """
        axis = max(0, min(1, len(self.shape) - 2))
        targets = self.dense.matrices(out, self.dense_axis(axis))
        for source, target in zip(self.matrices(buffer, axis, scales), targets, strict=True):
            for start, stop in source.ranges(DEQUANTIZED_ELEMENTS):
                on_panel()
                target.put(start, target.rounded(source.decoded(start, stop)))

    @abstractmethod
    def matrices(
        self, buffer: Bytes, axis: int, scales: Sequence[bytes] = (), experts: Experts = None
    ) -> Iterator[Matrix]:
        """The stored matrices: one, or one per expert.

        Args:
            buffer: the tensor's bytes.
            axis: the tensor's axis of length d_model, the residual stream.
            scales: bytes of the tensors `scales`.
            experts: those alone, one by one, of a tensor whose first axis counts them.
        """


@dataclass(frozen=True)
class PlainLayout(Layout):
    """Numbers in a plain format; of any axis order, dense or of experts."""

    def matrices(
        self, buffer: Bytes, axis: int, scales: Sequence[bytes] = (), experts: Experts = None
    ) -> Iterator[Matrix]:
        fmt = FORMATS[self.dtype]
        for weight in _matrices(fmt.view(buffer, self.shape), axis, experts):
            yield _Plain(fmt, weight)


@dataclass(frozen=True)
class ScaledLayout(Layout):
    """FP8 numbers, each block of which has a scale: weight = number x scale.

    `block` is the size of a block on each axis of the tensor; with one scale a row it is a row,
    with one a tensor all of it.
    """

    block: Shape = ()
    scale_dtype: str = "F32"
    kind: str = "FP8"

    def matrices(
        self, buffer: Bytes, axis: int, scales: Sequence[bytes] = (), experts: Experts = None
    ) -> Iterator[Matrix]:
        (data,) = scales
        counts = tuple(-(-n // step) for n, step in zip(self.shape, self.block, strict=True))
        units = scales_of(data, self.scale_dtype, counts)
        steps = self.block[-2:] if axis == len(self.shape) - 2 else self.block[:-3:-1]
        pairs = zip(
            _matrices(F8_E4M3.view(buffer, self.shape), axis, experts),
            _matrices(units, axis, experts),
            strict=True,
        )
        for weight, unit in pairs:
            yield _Scaled(F8_E4M3, weight, unit, steps)


@dataclass(frozen=True)
class Mxfp4Layout(Layout):
    """MXFP4 (OCP Microscaling 1.0): blocks [expert, H, b, 16] beside exponents [expert, H, b].

    As plain numbers it is what transformers' gpt-oss has without quantisation: [expert, 32 b, H].
    """

    kind = "MXFP4"
    plain_name: str = ""

    @property
    def dense(self) -> PlainLayout:
        """See `Layout.dense`."""
        experts, rows, blocks, _ = self.shape
        return PlainLayout(self.plain_name, DENSE, (experts, MXFP4_GROUP * blocks, rows))

    def dense_axis(self, axis: int) -> int:
        """See `Layout.dense_axis`."""
        return 3 - axis

    def matrices(
        self, buffer: Bytes, axis: int, scales: Sequence[bytes] = (), experts: Experts = None
    ) -> Iterator[Matrix]:
        import torch

        (data,) = scales
        if axis != 1:
            raise ValueError(f"{self.name}: axis 1 was expected, not {axis}")
        blocks = torch.frombuffer(buffer, dtype=torch.uint8).view(self.shape)
        exponents = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(self.shape[:-1])
        for part in [slice(None)] if experts is None else [slice(e, e + 1) for e in experts]:
            yield _Mxfp4(blocks[part], exponents[part])


class _Plain(Matrix):
    def __init__(self, fmt: Format, weight: Tensor) -> None:
        self._weight = weight
        self.compute, self.rounded = fmt.compute_dtype, fmt.rounded
        self.shape = (weight.shape[0], weight.shape[1])

    def get(self, start: int, stop: int) -> tuple[Tensor, Units | None]:
        return self._weight[:, start:stop].to(self.compute, copy=True), None

    def put(self, start: int, numbers: Tensor, rows: Tensor | None = None) -> None:
        columns = self._weight[:, start : start + numbers.shape[1]]
        if rows is None:
            columns.copy_(numbers)
        else:
            columns[rows] = numbers.to(columns.dtype)


class _Scaled(_Plain):
    def __init__(self, fmt: Format, weight: Tensor, units: Tensor, block: Shape) -> None:
        super().__init__(fmt, weight)
        self._units, self._block = units, block

    def get(self, start: int, stop: int) -> tuple[Tensor, Units | None]:
        import torch

        rows = torch.arange(self.shape[0]) // self._block[0]
        columns = torch.arange(start, stop) // self._block[1]
        scale = self._units[rows[:, None], columns[None, :]].to(self.compute)
        return super().get(start, stop)[0], Units(scale)


class _Mxfp4(Matrix):
    """All experts' columns one after the other, as a dense [expert, in, out] has them."""

    def __init__(self, blocks: Tensor, exponents: Tensor) -> None:
        import torch

        self._blocks, self._exponents = blocks, exponents
        self.compute, self.rounded = torch.float32, mxfp4_rounded
        self._inside = MXFP4_GROUP * blocks.shape[2]
        self.shape = (blocks.shape[1], blocks.shape[0] * self._inside)

    def ranges(self, elements: int) -> Iterator[tuple[int, int]]:
        width = MXFP4_GROUP * max(1, elements // (MXFP4_GROUP * self.shape[0]))
        for expert in range(0, self.shape[1], self._inside):
            for start in range(expert, expert + self._inside, width):
                yield start, min(start + width, expert + self._inside)

    def get(self, start: int, stop: int) -> tuple[Tensor, Units | None]:
        expert, part = self._part(start, stop - start)
        scale = mxfp4_scales(self._exponents[expert, :, part])
        return mxfp4_numbers(self._blocks[expert, :, part]), Units(scale)

    def put(self, start: int, numbers: Tensor, rows: Tensor | None = None) -> None:
        expert, part = self._part(start, numbers.shape[1])
        self._blocks[expert, :, part][slice(None) if rows is None else rows] = mxfp4_blocks(numbers)

    def _part(self, start: int, width: int) -> tuple[int, slice]:
        expert, column = divmod(start, self._inside)
        return expert, slice(column // MXFP4_GROUP, (column + width) // MXFP4_GROUP)


def _matrices(tensor: Tensor, axis: int, experts: Experts) -> Iterator[Tensor]:
    parts = [tensor] if experts is None else [tensor[e : e + 1] for e in experts]
    for part in parts:
        yield from residual_first(part, axis)


def residual_first(tensor: Tensor, axis: int) -> Iterator[Tensor]:
    """Views [H, c] of a tensor: one, or one per expert; `axis`, the residual stream, is first."""
    if tensor.ndim == 1:
        yield tensor[:, None]
    elif tensor.ndim == 3 and axis == 1:
        yield from tensor
    else:  # [out, in], or the other way round with all experts' rows together
        yield tensor if axis == 0 else tensor.flatten(0, -2).T
