"""Number formats: dtypes of stored numbers, decoding, and rounding to the nearest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from abliterator.errors import UnsupportedModel

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Format:
    """One number format, its dtypes by their torch names so that naming formats loads no torch.

    Attributes:
        name: as in a safetensors header.
        stored: dtype on disk.
        compute: dtype that edits are calculated in, wide enough that storing dominates the error.
        largest: largest finite number where storing would not saturate by itself, else None.
    """

    name: str
    stored: str
    compute: str
    largest: float | None = None

    def view(self, buffer: memoryview | bytearray, shape: tuple[int, ...]) -> torch.Tensor:
        """The bytes as a tensor of `shape` in the stored dtype; writing to it writes the bytes."""
        import torch

        return torch.frombuffer(buffer, dtype=self.stored_dtype).view(shape)

    @property
    def stored_dtype(self) -> torch.dtype:
        """`stored` as a torch dtype."""
        return _dtype(self.stored)

    def rounded(self, numbers: torch.Tensor) -> torch.Tensor:
        """`numbers`, each rounded to the nearest representable one, in their own dtype."""
        within = numbers if self.largest is None else numbers.clamp(-self.largest, self.largest)
        return within.to(self.stored_dtype).to(numbers.dtype)

    @property
    def compute_dtype(self) -> torch.dtype:
        """`compute` as a torch dtype."""
        return _dtype(self.compute)


class Units(NamedTuple):
    """What stored numbers [H, c] are in units of: weight = (number - zero) x scale.

    Attributes:
        scale: [H, c].
        zero: [H, c], the zero points; None where 0 stands for 0.
    """

    scale: torch.Tensor
    zero: torch.Tensor | None = None

    def weights_(self, numbers: torch.Tensor) -> torch.Tensor:
        """The weights of `numbers`, in their place."""
        return (numbers if self.zero is None else numbers.sub_(self.zero)).mul_(self.scale)

    def numbers(self, weights: torch.Tensor) -> torch.Tensor:
        """The reverse of `weights_`, before rounding."""
        units = weights / self.scale
        return units if self.zero is None else units.add_(self.zero)

    def rows(self, index: torch.Tensor) -> Units:
        """Those of some rows."""
        return Units(self.scale[index], None if self.zero is None else self.zero[index])

    def at(self, places: torch.Tensor, columns: slice) -> Units:
        """Those of the rows `places` [n, c] of some columns."""
        parts = (None if part is None else part[:, columns].gather(0, places) for part in self)
        return Units(*parts)  # type: ignore[arg-type]

    def columns(self, columns: slice) -> Units:
        """Those of some columns."""
        return Units(self.scale[:, columns], None if self.zero is None else self.zero[:, columns])


FORMATS = {
    fmt.name: fmt
    for fmt in (
        Format("BF16", "bfloat16", "float32"),
        Format("F16", "float16", "float32"),
        Format("F32", "float32", "float64"),
        Format("F64", "float64", "float64"),
    )
}
"""Formats without scales, by safetensors' names."""

# Weights in FP8 are numbers in units of a scale.
F8_E4M3 = Format("F8_E4M3", "float8_e4m3fn", "float32", largest=448.0)

# The eight sizes that a number of four bits can have in MXFP4 and NVFP4 (E2M1).
FP4_STEPS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MXFP4_GROUP = 32  # numbers that share a scale, in 16 bytes


def format_of(dtype: str, tensor: str) -> Format:
    """The format called `dtype` in a safetensors header.

    Raises:
        UnsupportedModel: for numbers that mean nothing without scales, and for formats that are not
            known; it names `tensor`.
    """
    try:
        return FORMATS[dtype]
    except KeyError:
        raise UnsupportedModel(
            f"Tensor {tensor} is stored as {dtype}; expected {', '.join(FORMATS)}. Use a "
            "checkpoint of the model in one of these formats."
        ) from None


def scales_of(data: bytes, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Stored scales as numbers, float64: of a plain format, or powers of two in one byte (E8M0).

    A byte e is 2^(e - 127), whether a header calls it F8_E8M0 or, before safetensors had that name,
    U8 (OCP Microscaling 1.0). Scales of NVFP4 are FP8 numbers themselves.
    """
    import torch

    buffer, fmt = bytearray(data), {**FORMATS, F8_E4M3.name: F8_E4M3}.get(dtype)
    if fmt is not None:
        return fmt.view(buffer, shape).to(torch.float64)
    return torch.exp2(torch.frombuffer(buffer, dtype=torch.uint8).view(shape).double() - 127)


SCALE_DTYPES = (*FORMATS, "F8_E8M0", "U8")


def fp4_numbers(codes: torch.Tensor) -> torch.Tensor:
    """Bytes [H, n / 2] of any further axes as FP4 numbers [H, n] float32, in units of their scales.

    A byte holds two numbers of 4 bits (OCP Microscaling 1.0, E2M1), the first in its low half.
    """
    import torch

    line = torch.tensor([*FP4_STEPS, *(-step for step in FP4_STEPS)])
    halves = torch.stack([codes & 15, codes >> 4], dim=-1)
    return line[halves.long()].flatten(1)


def fp4_bytes(numbers: torch.Tensor) -> torch.Tensor:
    """The reverse of `fp4_numbers`, [H, n / 2] uint8, for numbers that are representable."""
    import torch

    codes = torch.searchsorted(torch.tensor(FP4_STEPS), numbers.abs().contiguous())
    codes = (codes + 8 * torch.signbit(numbers)).to(torch.uint8)
    halves = codes.reshape(codes.shape[0], -1, 2)
    return torch.bitwise_or(halves[..., 0], halves[..., 1] << 4)


def fp4_rounded(numbers: torch.Tensor) -> torch.Tensor:
    """`numbers`, each rounded to the nearest FP4 number, in their own dtype."""
    import torch

    steps = torch.tensor(FP4_STEPS, dtype=numbers.dtype)
    between = (steps[1:] + steps[:-1]) / 2
    return steps[torch.searchsorted(between, numbers.abs().contiguous())].copysign(numbers)


def mxfp4_numbers(blocks: torch.Tensor) -> torch.Tensor:
    """MXFP4 blocks [H, b, 16] uint8 as numbers [H, 32 b] float32, in units of their scales."""
    return fp4_numbers(blocks)


def mxfp4_blocks(numbers: torch.Tensor) -> torch.Tensor:
    """The reverse of `mxfp4_numbers`, for numbers that are representable."""
    return fp4_bytes(numbers).reshape(numbers.shape[0], -1, MXFP4_GROUP // 2)


def mxfp4_scales(exponents: torch.Tensor) -> torch.Tensor:
    """Scales [H, b] uint8 (powers of two, biased by 127) as [H, 32 b] float32, one a number."""
    import torch

    scales = torch.exp2(exponents.float() - 127)
    return scales.repeat_interleave(MXFP4_GROUP, dim=1)


def mxfp4_rounded(numbers: torch.Tensor) -> torch.Tensor:
    """`numbers`, each rounded to the nearest MXFP4 number, in their own dtype."""
    return fp4_rounded(numbers)


def _dtype(name: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype
