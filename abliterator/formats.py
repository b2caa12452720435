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
    """

    name: str
    stored: str
    bits: str
    compute: str

    def view(self, buffer: memoryview | bytearray, shape: tuple[int, ...]) -> torch.Tensor:
        """The bytes as a tensor of `shape` in the stored dtype; writing to it writes the bytes."""
        import torch

        return torch.frombuffer(buffer, dtype=self.stored_dtype).view(shape)

    @property
    def stored_dtype(self) -> torch.dtype:
        """`stored` as a torch dtype."""
        return _dtype(self.stored)

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
    )
}


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
    usable = (exact != rounded) & (rounded != 0) & torch.isfinite(stepped)
    return torch.where(usable, stepped, stored)


def _dtype(name: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype
