"""Number formats: dtypes of stored numbers, decoding, and rounding to the nearest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

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

# The eight sizes that a number in MXFP4 can have (E2M1).
MXFP4_STEPS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
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
    U8 (OCP Microscaling 1.0).
    """
    import torch

    buffer = bytearray(data)
    if dtype in FORMATS:
        return FORMATS[dtype].view(buffer, shape).to(torch.float64)
    return torch.exp2(torch.frombuffer(buffer, dtype=torch.uint8).view(shape).double() - 127)


SCALE_DTYPES = (*FORMATS, "F8_E8M0", "U8")


def mxfp4_numbers(blocks: torch.Tensor) -> torch.Tensor:
    """MXFP4 blocks [H, b, 16] uint8 as numbers [H, 32 b] float32, in units of their scales.

    A byte holds two numbers of 4 bits (OCP Microscaling 1.0, E2M1), the first in its low half.
    """
    import torch

    line = torch.tensor([*MXFP4_STEPS, *(-step for step in MXFP4_STEPS)])
    halves = torch.stack([blocks & 15, blocks >> 4], dim=-1)
    return line[halves.long()].flatten(1)


def mxfp4_blocks(numbers: torch.Tensor) -> torch.Tensor:
    """The reverse of `mxfp4_numbers`, for numbers that are representable."""
    import torch

    codes = torch.searchsorted(torch.tensor(MXFP4_STEPS), numbers.abs().contiguous())
    codes = (codes + 8 * torch.signbit(numbers)).to(torch.uint8)
    halves = codes.reshape(codes.shape[0], -1, 16, 2)
    return torch.bitwise_or(halves[..., 0], halves[..., 1] << 4)


def mxfp4_scales(exponents: torch.Tensor) -> torch.Tensor:
    """Scales [H, b] uint8 (powers of two, biased by 127) as [H, 32 b] float32, one a number."""
    import torch

    scales = torch.exp2(exponents.float() - 127)
    return scales.repeat_interleave(MXFP4_GROUP, dim=1)


def mxfp4_rounded(numbers: torch.Tensor) -> torch.Tensor:
    """`numbers`, each rounded to the nearest MXFP4 number, in their own dtype."""
    import torch

    steps = torch.tensor(MXFP4_STEPS, dtype=numbers.dtype)
    between = (steps[1:] + steps[:-1]) / 2
    return steps[torch.searchsorted(between, numbers.abs().contiguous())].copysign(numbers)


def _dtype(name: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype
