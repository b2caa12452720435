"""Layouts of matrices whose numbers are packed: integers of 4 or 8 bits, and FP4 (NVFP4, MXFP4)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from abliterator.formats._layout import (
    DENSE,
    Bytes,
    Experts,
    Layout,
    Matrix,
    PlainLayout,
    Shape,
)
from abliterator.formats._numbers import (
    Units,
    fp4_bytes,
    fp4_numbers,
    fp4_rounded,
    scales_of,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from abliterator.formats._scheme import Header

WORD_BITS = 32
STEPS = 4  # 10 leave hardly less: int4, k = 16: noise over nearest's 1.41 with 1, 1.17 with 4, 1.16
IN_TURN = tuple(range(8))  # order in which a word's bits hold its numbers, from the lowest
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place in a word of 32 bits of each of eight numbers in turn, as AutoAWQ's GEMM kernels have it.

Place i holds number (0, 2, 4, 6, 1, 3, 5, 7)[i] (awq/modules/linear/gemm.py, `order_map`).
"""


class Part(NamedTuple):
    """A stored tensor that belongs to a packed one; `role` is what for."""

    role: str
    name: str
    dtype: str
    shape: Shape


@dataclass(frozen=True)
class PackedLayout(Layout):
    """A matrix [out, in] whose numbers are packed; `scales` are the names of its `parts`.

    Attributes:
        parts: scales, zero points and whatever else it is read with.
        plain_name: name of the tensor where it is not quantised.
        plain_shape: [out, in].
        group: numbers of a row that share a scale.
        kind: its name in measured.yaml.
    """

    parts: tuple[Part, ...] = ()
    plain_name: str = ""
    plain_shape: tuple[int, int] = (0, 0)
    group: int = 0
    kind: str = ""

    @classmethod
    def of(
        cls,
        name: str,
        header: Header,
        parts: Iterable[Part | None],
        *,
        plain_name: str,
        plain_shape: tuple[int, int],
        **attributes: Any,
    ) -> Self:
        """The layout of a tensor with those of its parts that are there."""
        present = tuple(part for part in parts if part is not None)
        return cls(
            name,
            header.dtype,
            header.shape,
            tuple(part.name for part in present),
            parts=present,
            plain_name=plain_name,
            plain_shape=plain_shape,
            **attributes,
        )

    @property
    def dense(self) -> PlainLayout:
        """See `Layout.dense`."""
        return PlainLayout(self.plain_name, DENSE, self.plain_shape)

    def fault(self, scales: Sequence[bytes]) -> str | None:
        """See `Layout.fault`."""
        return next(filter(None, map(_fault, [self] * len(scales), self.parts, scales)), None)

    def _numbers(self, role: str, scales: Sequence[bytes]) -> Tensor | None:
        """The tensor of a role in its stored shape, float64 or int32; None if there is none."""
        for part, data in zip(self.parts, scales, strict=True):
            if part.role == role:
                return part_numbers(part, data)
        return None

    def _require_rows(self, axis: int, experts: Experts) -> None:
        if axis != 0 or experts is not None:
            raise ValueError(f"{self.name}: a matrix [out, in] was expected, not axis {axis}")


def part_numbers(part: Part, data: bytes) -> Tensor:
    """The numbers of a part in its shape: integers as int32 or int64, others as float64."""
    import torch

    integers: Mapping[str, torch.dtype] = {
        "I8": torch.int8,
        "I32": torch.int32,
        "I64": torch.int64,
    }
    if part.dtype in integers:
        stored = torch.frombuffer(bytearray(data), dtype=integers[part.dtype]).view(part.shape)
        return stored.int() if part.dtype == "I8" else stored
    return scales_of(data, part.dtype, part.shape)


def _fault(layout: PackedLayout, part: Part, data: bytes) -> str | None:
    """What is wrong with the bytes of one part."""
    import torch

    numbers = part_numbers(part, data)
    if part.role == "shape":
        stated = [int(n) for n in numbers.flatten()]
        if stated != list(layout.plain_shape):
            return f"{part.name} says {stated}, and the packed numbers are {layout.plain_shape}"
    elif part.role == "order":
        groups = -(-layout.plain_shape[1] // layout.group)
        if not in_turn(numbers) and not bool(((numbers >= 0) & (numbers < groups)).all()):
            return f"{part.name} has groups outside of 0 to {groups - 1}"
    elif part.role in ("scale", "unit", "divisor"):
        if not bool(torch.isfinite(numbers).all()):
            return f"{part.name} has numbers that are infinite or NaN"
        if part.role != "scale" and not bool((numbers > 0).all()):
            return f"{part.name} is not above 0"
    elif isinstance(layout, IntegerLayout) and part.role == "zero":
        zeros = layout.zero_points(part, numbers)
        low, high = layout.range
        if not bool(((zeros >= low) & (zeros <= high)).all()):
            return f"{part.name} has zero points outside of the {high - low + 1} numbers there are"
    return None


def in_turn(order: Tensor) -> bool:
    """Whether groups follow one another, as a tensor of -1 says, which was never filled."""
    return bool((order == -1).all())


@dataclass(frozen=True)
class IntegerLayout(PackedLayout):
    """Integers in groups: weight = (integer - zero point) x scale.

    Attributes:
        bits: of a number, 4 or 8.
        turned: whether tensors are stored as [in, out].
        along_out: whether a word holds numbers of several outputs, not of several inputs.
        places: place in a word of each of its numbers.
        zero_bits: of a packed zero point; 0 where each is a number of its own.
        zero_offset: what is added to a stored zero point.
    """

    bits: int = 4
    turned: bool = False
    along_out: bool = False
    places: tuple[int, ...] = IN_TURN
    zero_bits: int = 0
    zero_offset: int = 0

    @property
    def per_word(self) -> int:
        """How many numbers an element of the stored tensor holds."""
        return 1 if self.dtype == "I8" else WORD_BITS // self.bits

    @property
    def range(self) -> tuple[int, int]:
        """The smallest and the largest number: they are held as signed, whatever is stored."""
        half = 1 << (self.bits - 1)
        return -half, half - 1

    def zero_points(self, part: Part, stored: Tensor) -> Tensor:
        """Zero points [out, groups] as signed numbers, from the part's stored ones."""
        if not self.zero_bits:
            return stored
        rows = self.plain_shape[0]
        words = stored if self.turned else stored.T  # [groups, out / per word]
        codes = unpacked(words, self.zero_bits, self._places_of_zeros)[:, :rows]
        zeros: Tensor = codes.T + self.zero_offset + self.range[0]
        return zeros

    @property
    def _places_of_zeros(self) -> tuple[int, ...]:
        return self.places[: WORD_BITS // self.zero_bits]

    def matrices(
        self, buffer: Bytes, axis: int, scales: Sequence[bytes] = (), experts: Experts = None
    ) -> Iterator[Matrix]:
        """See `Layout.matrices`."""
        import torch

        self._require_rows(axis, experts)
        scale, order = self._numbers("scale", scales), self._numbers("order", scales)
        if scale is None:
            raise ValueError(f"{self.name} comes without its scales")
        scale = scale.reshape(-1, 1) if scale.ndim < 2 else scale  # one for all, or one a row
        rows, columns = self.plain_shape
        scale = (scale.T if self.turned else scale).expand(rows, -1)
        zero = None
        for part, data in zip(self.parts, scales, strict=True):
            if part.role == "zero":
                zero = self.zero_points(part, part_numbers(part, data))
        groups = torch.arange(columns) // self.group
        if order is not None and not in_turn(order):
            groups = order.long()
        stored_dtype = torch.int8 if self.dtype == "I8" else torch.int32
        words = torch.frombuffer(buffer, dtype=stored_dtype).view(self.shape)
        yield _Integers(self, words, Units(scale.float(), zero), groups)


class _Integers(Matrix):
    steps = STEPS
    together = WORD_BITS

    def __init__(self, layout: IntegerLayout, words: Tensor, units: Units, groups: Tensor) -> None:
        import torch

        self._layout, self._units, self._groups = layout, units, groups
        # the packed axis last
        self._words = words if layout.turned == layout.along_out else words.T
        self.compute, self.rounded = torch.float32, self._rounded
        self.shape = layout.plain_shape

    def get(self, start: int, stop: int) -> tuple[Tensor, Units | None]:
        groups = self._groups[start:stop]
        scale, zero = self._units
        of_columns = Units(scale[:, groups], None if zero is None else zero[:, groups].float())
        return self._codes(start, stop).float(), of_columns

    def put(self, start: int, numbers: Tensor, rows: Tensor | None = None) -> None:
        stop = start + numbers.shape[1]
        first, last = self._words_of(start, stop)
        codes = self._unpacked(first, last)
        offset = start - first * self._per_column
        part = codes[:, offset : offset + stop - start]
        part[slice(None) if rows is None else rows] = numbers.to(codes.dtype)
        layout = self._layout
        if layout.per_word == 1:
            self._words[:, first:last] = codes.to(self._words.dtype)
            return
        codes = codes - layout.range[0]
        if layout.along_out:
            self._words[first:last] = packed(codes.T, layout.bits, layout.places)
        else:
            self._words[:, first:last] = packed(codes, layout.bits, layout.places)

    @cached_property
    def _per_column(self) -> int:
        """Columns that an element of the stored tensor holds numbers of."""
        return 1 if self._layout.along_out else self._layout.per_word

    def _words_of(self, start: int, stop: int) -> tuple[int, int]:
        return start // self._per_column, -(-stop // self._per_column)

    def _codes(self, start: int, stop: int) -> Tensor:
        first, last = self._words_of(start, stop)
        offset = start - first * self._per_column
        return self._unpacked(first, last)[:, offset : offset + stop - start]

    def _unpacked(self, first: int, last: int) -> Tensor:
        """Signed numbers [out, c] of elements `first` to `last` along the input, a copy."""
        layout = self._layout
        if layout.per_word == 1:
            return self._words[:, first:last].int()
        if layout.along_out:
            codes = unpacked(self._words[first:last], layout.bits, layout.places).T
        else:
            codes = unpacked(self._words[:, first:last], layout.bits, layout.places)
        return codes[: self.shape[0]] + layout.range[0]

    def _rounded(self, numbers: Tensor) -> Tensor:
        # a group whose scale is 0 is 0, whatever its numbers are
        return numbers.nan_to_num(0.0).round_().clamp_(*self._layout.range)


def unpacked(words: Tensor, bits: int, places: Sequence[int]) -> Tensor:
    """Words [m, w] of int32 as unsigned numbers [m, w x numbers a word] of int32."""
    import torch

    shifts = torch.tensor(places[: WORD_BITS // bits], dtype=torch.int32) * bits
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(1)


def packed(numbers: Tensor, bits: int, places: Sequence[int]) -> Tensor:
    """The reverse of `unpacked`; missing numbers of the last word are 0."""
    import torch

    per_word = WORD_BITS // bits
    filled = -(-numbers.shape[1] // per_word) * per_word
    numbers = torch.nn.functional.pad(numbers, (0, filled - numbers.shape[1]))
    numbers = numbers.reshape(numbers.shape[0], -1, per_word)
    words = torch.zeros(numbers.shape[:2], dtype=torch.int32)
    for i, place in enumerate(places[:per_word]):
        words |= numbers[:, :, i].int() << (place * bits)
    return words


@dataclass(frozen=True)
class Fp4Layout(PackedLayout):
    """FP4 (E2M1) numbers [out, in / 2] of U8, the first of two in a byte's low half.

    A group of a row shares a scale (role "scale"), and all groups one more: weight = number x scale
    x unit (role "unit"), or number x scale / divisor (role "divisor").
    """

    def matrices(
        self, buffer: Bytes, axis: int, scales: Sequence[bytes] = (), experts: Experts = None
    ) -> Iterator[Matrix]:
        """See `Layout.matrices`."""
        import torch

        self._require_rows(axis, experts)
        scale = self._numbers("scale", scales)
        if scale is None:
            raise ValueError(f"{self.name} comes without its scales")
        if (unit := self._numbers("unit", scales)) is not None:
            scale = scale * unit.flatten()
        if (divisor := self._numbers("divisor", scales)) is not None:
            scale = scale / divisor.flatten()
        codes = torch.frombuffer(buffer, dtype=torch.uint8).view(self.shape)
        yield _Fp4(codes, scale.float(), self.group)


class _Fp4(Matrix):
    steps = STEPS
    together = WORD_BITS

    def __init__(self, codes: Tensor, scale: Tensor, group: int) -> None:
        import torch

        self._codes, self._scale, self._group = codes, scale, group
        self.compute, self.rounded = torch.float32, _rounded_fp4
        self.shape = (codes.shape[0], 2 * codes.shape[1])

    def get(self, start: int, stop: int) -> tuple[Tensor, Units | None]:
        import torch

        groups = torch.arange(start, stop) // self._group
        return fp4_numbers(self._codes[:, start // 2 : stop // 2]), Units(self._scale[:, groups])

    def put(self, start: int, numbers: Tensor, rows: Tensor | None = None) -> None:
        columns = self._codes[:, start // 2 : (start + numbers.shape[1]) // 2]
        columns[slice(None) if rows is None else rows] = fp4_bytes(numbers)


def _rounded_fp4(numbers: Tensor) -> Tensor:
    return fp4_rounded(numbers.nan_to_num(0.0))  # of a group whose scale is 0
