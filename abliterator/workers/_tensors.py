"""Tensors as plain data, which any process can be sent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class PackedTensor(NamedTuple):
    """A tensor as bytes: torch would send one through shared memory, which a dead process loses.

    The order of its dimensions in memory is kept: the rounding of products depends on it.
    """

    data: Any  # numpy, uint8
    dtype: str
    shape: tuple[int, ...]  # of the dimensions in the order in which they are stored
    order: tuple[int, ...]


def pack_tensor(tensor: Tensor) -> PackedTensor:
    """A tensor of any shape, dtype and device as bytes."""
    import torch

    strides = tensor.stride()
    order = tuple(sorted(range(tensor.ndim), key=lambda dim: strides[dim], reverse=True))
    stored = tensor.detach().cpu().permute(order).contiguous()
    data = stored.reshape(-1).view(torch.uint8).numpy()
    return PackedTensor(data, str(tensor.dtype).removeprefix("torch."), stored.shape, order)


def unpack_tensor(packed: PackedTensor) -> Tensor:
    """The tensor that `pack_tensor` got, on the CPU."""
    import numpy as np
    import torch

    data = packed.data if packed.data.flags.writeable else np.copy(packed.data)
    stored = torch.from_numpy(data).view(getattr(torch, packed.dtype)).view(packed.shape)
    return stored.permute([packed.order.index(dim) for dim in range(len(packed.order))])
