"""Where the weights of a model will lie while it runs, from its headers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from abliterator.checkpoint import Checkpoint
from abliterator.costs import dtype_bytes
from abliterator.devices import (
    AUTO,
    BALANCED,
    CPU,
    accelerator_is_possible,
    available_devices,
    choose_device,
    device_memory,
    weight_room,
)

DISK = "disk"


class Where(BaseModel):
    """Where weights will lie, if memory stays as free as it is now.

    Attributes:
        device: the first that computes.
        dtype: of computation.
        weights: bytes of them in that dtype.
        places: bytes on each device, "cpu" for host memory, and "disk".
        free: bytes that are free on each device now.
        devices: accelerators that may be used.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str
    dtype: str
    weights: int
    places: dict[str, int]
    free: dict[str, int]
    devices: int

    @property
    def streams(self) -> bool:
        """Whether part of the weights is read from disk in every pass."""
        return DISK in self.places


def where_weights_lie(
    checkpoint: Checkpoint,
    *,
    device: str = AUTO,
    dtype: str = "auto",
    max_memory: int | None = None,
) -> Where:
    """Where `load_model` would put the weights, exact to a block of the model.

    torch is imported where this machine may have an accelerator, or a device is named.

    Args:
        checkpoint: the model.
        device: as `Options.device`.
        dtype: as `Options.dtype`.
        max_memory: as `Options.max_memory`.

    Raises:
        RecipeError: if this machine has no such device.
    """
    asks_torch = device not in (AUTO, CPU) or (device == AUTO and accelerator_is_possible())
    if asks_torch or max_memory is not None:
        first = choose_device(AUTO if device == BALANCED else device)
        devices = available_devices()
    else:
        first, devices = CPU, [CPU]
    if dtype == "auto":
        fits = is_computed_in_float32(checkpoint, first)
        dtype = "float32" if fits else _stored_dtype(checkpoint)
    numbers = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    size = int(numbers * dtype_bytes(dtype))
    free = {place: device_memory(place).free for place in devices}
    if device not in (AUTO, BALANCED):
        places = {first: size}
    else:
        room = weight_room(free, max_memory)
        spread_evenly = device == BALANCED and len(devices) > 2
        places = _filled(size, _even(room, size) if spread_evenly else room)
    return Where(
        device=first,
        dtype=dtype,
        weights=size,
        places=places,
        free=free,
        devices=len(devices) - 1,
    )


def is_computed_in_float32(checkpoint: Checkpoint, device: str) -> bool:
    """Whether a checkpoint is computed in float32 where no dtype is chosen.

    CPUs are faster at it; it must fit in half of the host's memory.
    """
    in_float32 = sum(4 * math.prod(info.shape) for info in checkpoint.tensors.values())
    return device == CPU and in_float32 < device_memory(CPU).total / 2


def _stored_dtype(checkpoint: Checkpoint) -> str:
    stated = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    return stated if stated in {"float32", "bfloat16", "float16"} else "bfloat16"


def _even(room: Mapping[str, int], size: int) -> dict[str, int]:
    accelerators = [place for place in room if place != CPU]
    share = math.ceil(size / max(1, len(accelerators)))
    return {p: min(r, share) if p in accelerators[:-1] else r for p, r in room.items()}


def _filled(size: int, room: Mapping[str, int]) -> dict[str, int]:
    """Bytes on each device: all on the first where they fit, else one after the other."""
    places: dict[str, int] = {}
    for place, bytes_free in room.items():
        part = min(size, bytes_free)
        if part:
            places[place] = part
        size -= part
    return {**places, DISK: size} if size else places
