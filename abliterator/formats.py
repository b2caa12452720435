"""How a stored tensor becomes numbers and back: the storage formats that an edit can keep.

The room knows bit layouts, not files and not what an edit means. Names are safetensors' own
("BF16"). Every format here has the property that an edit needs: storing keeps dtype, shape and
length, so that bytes can be replaced in place.

    weight = FORMATS["BF16"].view(buffer, (4096, 4096))     # torch view of the bytes, no copy
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from abliterator.errors import UnsupportedModel

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Format:
    """One storage format, its dtypes by their torch names so that naming formats loads no torch.

    Attributes:
        name: as in a safetensors header.
        stored: dtype on disk.
        bits: integer dtype of the same width.
        compute: dtype that edits are calculated in, wide enough that storing dominates the error.
        largest: largest finite number where storing would not saturate by itself, else None.
        scaled: whether blocks of numbers have a scale, in a tensor of its own (`SCALE_SUFFIX`).
    """

    name: str
    stored: str
    bits: str
    compute: str
    largest: float | None = None
    scaled: bool = False

    def view(self, buffer: memoryview | bytearray, shape: tuple[int, ...]) -> torch.Tensor:
        """The bytes as a tensor of `shape` in the stored dtype; writing to it writes the bytes."""
        import torch

        return torch.frombuffer(buffer, dtype=self.stored_dtype).view(shape)

    @property
    def stored_dtype(self) -> torch.dtype:
        """`stored` as a torch dtype."""
        return _dtype(self.stored)

    @property
    def bits_dtype(self) -> torch.dtype:
        """`bits` as a torch dtype."""
        return _dtype(self.bits)

    def clamped(self, numbers: torch.Tensor) -> torch.Tensor:
        """`numbers`, no further from zero than the format reaches."""
        return numbers if self.largest is None else numbers.clamp(-self.largest, self.largest)

    @property
    def compute_dtype(self) -> torch.dtype:
        """`compute` as a torch dtype."""
        return _dtype(self.compute)


FORMATS = {
    fmt.name: fmt
    for fmt in (
        Format("BF16", "bfloat16", "int16", "float32"),
        Format("F16", "float16", "int16", "float32"),
        Format("F32", "float32", "int32", "float64"),
        Format("F64", "float64", "int64", "float64"),
        # weights in FP8 are numbers in units of a block's scale, as DeepSeek and Qwen store them
        Format("F8_E4M3", "float8_e4m3fn", "int8", "float32", largest=448.0, scaled=True),
    )
}

# The eight sizes that a number in MXFP4 can have (E2M1).
MXFP4_STEPS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

# A scaled tensor's scales, each for a block of rows and columns: weight = stored * scale.
SCALE_SUFFIX = "_scale_inv"


def format_of(dtype: str, tensor: str) -> Format:
    """The format called `dtype` in a safetensors header.

    Raises:
        UnsupportedModel: for a format whose edit is not implemented; it names `tensor`.
    """
    try:
        return FORMATS[dtype]
    except KeyError:
        raise UnsupportedModel(
            f"Tensor {tensor} is stored as {dtype}; an edit can be stored in "
            f"{', '.join(FORMATS)}. Use a checkpoint of the model in one of these formats."
        ) from None


def neighbours(numbers: torch.Tensor, fmt: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """The representable numbers on both sides of `numbers`, the nearer first, in their dtype."""
    within = fmt.clamped(numbers)
    nearest = within.to(fmt.stored_dtype)
    other = other_neighbour(nearest, within, fmt)
    return nearest.to(numbers.dtype), other.to(numbers.dtype)


def other_neighbour(stored: torch.Tensor, exact: torch.Tensor, fmt: Format) -> torch.Tensor:
    """The representable number on the other side of `exact`.

    `stored` is `exact` rounded to nearest, so `exact` lies between `stored` and the result. IEEE
    numbers of one sign are ordered like the integers of their bits: a neighbour is one step away.

    Args:
        stored: any shape, the format's stored dtype, finite.
        exact: same shape, compute dtype.
        fmt: the format of `stored`.

    Returns:
        Same shape and dtype as `stored`; equal to `stored` where `exact` is represented exactly,
        and where a step would leave the finite numbers or start from zero.
    """
    import torch

    rounded = stored.to(exact.dtype)
    further = exact.abs() > rounded.abs()  # the exact value lies further from zero than the stored
    bits = stored.view(_dtype(fmt.bits))
    stepped = torch.where(further, bits + 1, bits - 1).view(stored.dtype)
    usable = (exact != rounded) & (rounded != 0) & torch.isfinite(stepped.to(exact.dtype))
    return torch.where(usable, stepped.view(bits.dtype), bits).view(stored.dtype)


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
    return scales.repeat_interleave(32, dim=1)


def mxfp4_neighbours(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`neighbours` in MXFP4; beyond the largest number there is none."""
    import torch

    line = torch.tensor(sorted({*MXFP4_STEPS, *(-step for step in MXFP4_STEPS)}))
    within = numbers.clamp(-MXFP4_STEPS[-1], MXFP4_STEPS[-1]).contiguous()
    above = torch.searchsorted(line, within).clamp(min=1)
    low, high = line[above - 1], line[above]
    nearest = torch.where(high - within <= within - low, high, low)
    other = torch.where(nearest == within, nearest, low + high - nearest)
    return nearest, other


def _dtype(name: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype
