"""Where the parts of a model lie: on one device, on several, in host memory, on disk."""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterator.devices import (
    AUTO,
    BALANCED,
    CPU,
    available_devices,
    choose_device,
    device_memory,
    weight_room,
)

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

DISK = "disk"


@dataclass(frozen=True)
class WeightLimit:
    """Where weights may lie, and how many bytes of them.

    Attributes:
        device: "auto" (the first accelerator if the model fits there, else all accelerators, then
            host memory, then disk), "balanced" (all accelerators, evenly), or one device.
        max_memory: bytes of weights on each accelerator and in host memory at most; None is
            `WEIGHTS_SHARE` of what is free.
    """

    device: str
    max_memory: int | None = None

    def room(self) -> dict[str, int]:
        """Bytes of weights that each device may hold, in the order in which they are filled."""
        free = {device: device_memory(device).free for device in available_devices()}
        return weight_room(free, self.max_memory)

    def holds(self, size: int) -> bool:
        """Whether the first device may hold `size` bytes."""
        return size <= next(iter(self.room().values()))


def device_map(model: PreTrainedModel, limit: WeightLimit, dtype: torch.dtype) -> dict[str, str]:
    """The device of every module, as accelerate reads it; one device alone where the model fits.

    Args:
        model: on the meta device, of the shapes that will be loaded.
        limit: where the weights may lie.
        dtype: in which they will be held.

    Returns:
        Module path to device; the path "" is the whole model.
    """
    from accelerate import infer_auto_device_map
    from accelerate.utils import compute_module_sizes

    room, sizes = limit.room(), compute_module_sizes(model, dtype=dtype)
    spread = limit.device == BALANCED and len(room) > 2
    if limit.holds(sizes[""]) and not spread:
        return {"": choose_device(AUTO)}
    unsplit = set(model._no_split_modules or ())
    if spread:
        room = _even(room, sizes[""], _largest(model, unsplit, sizes))
    # accelerate names accelerators by their index, and an Apple GPU, of which there is one, "mps"
    keys = {"mps" if d == "mps:0" else d if d == CPU else i: d for i, d in enumerate(room)}
    modules = infer_auto_device_map(
        model,
        max_memory={key: room[device] for key, device in keys.items()},
        no_split_module_classes=list(unsplit),
        dtype=dtype,
        clean_result=False,
    )
    places = {path: keys.get(place, DISK) for path, place in modules.items()}
    if set(places.values()) == {DISK}:
        # accelerate wants a second device beside the disk
        places[min(places, key=lambda path: sizes.get(path, 0))] = CPU
    return places if len(set(places.values())) > 1 else {"": next(iter(places.values()))}


def main_device(modules: Mapping[str, str]) -> str:
    """The device that inputs go to, and that computes what lies in host memory or on disk."""
    return next((place for place in modules.values() if place not in (CPU, DISK)), CPU)


def needs_disk(modules: Mapping[str, str]) -> bool:
    """Whether a device map (`placement_of`) leaves weights on disk, to be read in every pass."""
    return DISK in modules.values()


def offload_options(modules: Mapping[str, str]) -> tuple[dict[str, Any], Path | None]:
    """Arguments of `from_pretrained` for a device map, and the folder of weights on disk."""
    if set(modules) == {""}:
        return {}, None
    folder = None
    if needs_disk(modules):
        folder = Path(tempfile.mkdtemp(prefix="abliterator-weights-"))
    return {"device_map": dict(modules), "offload_folder": folder and str(folder)}, folder


def remove_with(model: nn.Module, folder: Path | None) -> None:
    """Removes the folder of offloaded weights when the model is no longer used."""
    if folder is not None:
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)


def _even(room: Mapping[str, int], total: int, largest: int) -> dict[str, int]:
    """Room for an even share on each accelerator, and a block more, since blocks are not split."""
    accelerators = [name for name in room if name != CPU]
    share = math.ceil(total / max(1, len(accelerators))) + largest
    even = {name: min(room[name], share) for name in accelerators[:-1]}
    return {**room, **even}


def _largest(model: nn.Module, unsplit: set[str], sizes: Mapping[str, int]) -> int:
    """Bytes of the largest module that stays whole: a block, or one with weights of its own."""
    return max(
        sizes[path]
        for path, module in model.named_modules()
        if type(module).__name__ in unsplit or not any(module.children())
    )
