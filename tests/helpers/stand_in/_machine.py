"""The devices, their rules, and what lies on them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch

NAME = "fake"
UNLIMITED = 1 << 40
"""The memory of a device without a limit, in bytes, for those who ask."""

_NOT_ON_DEVICE = (torch.float64, torch.complex128)


@dataclass
class Machine:
    """The devices, their rules, and what lies on them.

    Args:
        devices: their number.
        float64: whether they have it.
        limit: bytes of each device; None: `UNLIMITED`.

    Attributes:
        used: bytes by device index.
        peak: the most there were, by device index.
        current: the index of the current device.
        freed: how often `empty_cache` was called.
        synchronised: how often `synchronize` was called.
        refused: errors of the backward pass that is running.
    """

    devices: int = 1
    float64: bool = False
    limit: int | None = None
    used: Counter[int] = field(default_factory=Counter)
    peak: Counter[int] = field(default_factory=Counter)
    current: int = 0
    freed: int = 0
    synchronised: int = 0
    refused: list[Exception] = field(default_factory=list)
    _storages: WeakValueDictionary[tuple[int, int], Storage] = field(
        default_factory=WeakValueDictionary
    )

    @property
    def total(self) -> int:
        """Bytes of each device."""
        return UNLIMITED if self.limit is None else self.limit

    def require(self, dtype: torch.dtype) -> None:
        """Raises TypeError for a dtype that the devices do not have."""
        if dtype in _NOT_ON_DEVICE and not self.float64:
            refuse(TypeError(f"Cannot convert a {NAME} tensor to {dtype}: no float64 there"))

    def hold(self, tensor: torch.Tensor, index: int) -> Storage:
        """The storage of a tensor, counted once for as long as anything on the device holds it."""
        if index >= self.devices:
            refuse(RuntimeError(f"invalid device ordinal: {NAME}:{index} of {self.devices}"))
        self.require(tensor.dtype)
        storage = tensor.untyped_storage()
        key = (storage.data_ptr(), index)
        held = self._storages.get(key)
        if held is None:
            held = self._storages[key] = Storage(self, index, storage.nbytes())
        return held


class Storage:
    """Bytes of a device, free again when the last tensor that holds them is gone."""

    def __init__(self, machine: Machine, index: int, size: int) -> None:
        self.machine, self.index, self.size = machine, index, 0
        free = machine.total - machine.used[index]
        if size > free:
            text = f"Tried to allocate {size} bytes; {NAME}:{index} has {machine.total}, of which"
            refuse(torch.OutOfMemoryError(f"{NAME} out of memory. {text} {free} are free."))
        self.size = size
        machine.used[index] += size
        machine.peak[index] = max(machine.peak[index], machine.used[index])

    def __del__(self) -> None:
        self.machine.used[self.index] -= self.size


@dataclass
class Present:
    """The machine that is there now, inside of `accelerator()`."""

    machine: Machine | None = None


PRESENT = Present()


def present() -> Machine:
    """The machine that is there.

    Raises:
        RuntimeError: outside of `accelerator()`.
    """
    if PRESENT.machine is None:
        raise RuntimeError(f"There is no device {NAME} outside of accelerator()")
    return PRESENT.machine


def refuse(error: Exception) -> None:
    """Raises; within a backward pass, after it."""
    if torch._C._current_graph_task_id() == -1:
        raise error
    present().refused.append(error)


_run_backward = torch.autograd.graph._engine_run_backward


def run_backward_refusing(*args: Any, **kwargs: Any) -> Any:
    gradients, refused = _run_backward(*args, **kwargs), present().refused
    if refused:
        error = refused[0]
        refused.clear()
        raise error
    return gradients
