"""What torch asks a kind of device for: its module, its hooks, its kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.utils.backend_registration

from tests.helpers.stand_in._machine import NAME, PRESENT, present
from tests.helpers.stand_in._tensor import OnDevice, aten, index_of, inner_of, run


class Module:
    """`torch.get_device_module("fake")`, and `torch.fake`."""

    def is_initialized(self) -> bool:
        return PRESENT.machine is not None

    def is_available(self) -> bool:
        return PRESENT.machine is not None

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def device_count(self) -> int:
        return 0 if PRESENT.machine is None else PRESENT.machine.devices

    def current_device(self) -> int:
        return present().current

    def set_device(self, device: object) -> None:
        present().current = index_of(device) or 0

    def get_device_name(self, device: object = None) -> str:
        return "Stand-in accelerator"

    def synchronize(self, device: object = None) -> None:
        present().synchronised += 1

    def empty_cache(self) -> None:
        if PRESENT.machine is not None:
            PRESENT.machine.freed += 1

    def memory_allocated(self, device: object = None) -> int:
        return present().used[self._index(device)]

    def max_memory_allocated(self, device: object = None) -> int:
        return present().peak[self._index(device)]

    memory_reserved = memory_allocated
    max_memory_reserved = max_memory_allocated

    def reset_peak_memory_stats(self, device: object = None) -> None:
        index = self._index(device)
        present().peak[index] = present().used[index]

    def mem_get_info(self, device: object = None) -> tuple[int, int]:
        machine, index = present(), self._index(device)
        return machine.total - machine.used[index], machine.total

    def _index(self, device: object) -> int:
        index = index_of(device)
        return present().current if index is None else index

    def _stats(self, device: int) -> dict[str, Any]:
        kinds = {
            "current": self.memory_allocated(device),
            "peak": self.max_memory_allocated(device),
        }
        return {name: {"all": kinds} for name in ("allocated_bytes", "reserved_bytes")}

    def _exchange(self, index: int) -> int:
        before, present().current = present().current, index
        return before


def bindings(module: Module) -> dict[str, Callable[..., Any]]:
    """What torch binds to its own allocators and guards, by its name in `torch._C`."""
    return {
        "_accelerator_isAllocatorInitialized": lambda: True,
        "_accelerator_emptyCache": module.empty_cache,
        "_accelerator_emptyHostCache": lambda: None,
        "_accelerator_synchronizeDevice": module.synchronize,
        "_accelerator_getDeviceStats": module._stats,
        "_accelerator_getMemoryInfo": module.mem_get_info,
        "_accelerator_resetPeakStats": module.reset_peak_memory_stats,
        "_accelerator_resetAccumulatedStats": lambda device: None,
        "_accelerator_getDeviceIndex": module.current_device,
        "_accelerator_setDeviceIndex": module.set_device,
        "_accelerator_exchangeDevice": module._exchange,
        "_accelerator_maybeExchangeDevice": module._exchange,
    }


def available() -> bool:
    """Whether this torch can have the devices: it lets Python be a backend, and has no other."""
    registration = torch.utils.backend_registration
    if not hasattr(registration, "_setup_privateuseone_for_python_backend"):
        return False
    present = torch._C._accelerator_getAccelerator()
    # a torch that was built for CUDA names it on machines without, too
    return present is None or present.type == NAME or not torch.accelerator.is_available()


def _register() -> Module:
    """Makes the kind of device known to torch, for the rest of the process."""
    registration: Any = torch.utils.backend_registration

    class Hook(torch._C._acc.PrivateUse1Hooks):
        def is_available(self) -> bool:
            return PRESENT.machine is not None

        def has_primary_context(self, index: int) -> bool:
            return True

        def is_built(self) -> bool:
            return True

    module = Module()
    registration._setup_privateuseone_for_python_backend(NAME, module, Hook())
    _kernels()
    return module


def _run_composed(kernel: Any, *args: Any) -> Any:
    return run(kernel, args, {})


def _kernels() -> None:
    """Kernels for what torch makes below Python's modes."""
    library = torch.library.Library("aten", "IMPL")

    def empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
        return OnDevice(torch.empty_strided(size, stride, dtype=dtype), index_of(device) or 0)

    def empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
        return OnDevice(torch.empty(size, dtype=dtype), index_of(device) or 0)

    def copy_from(source, target, non_blocking=False):
        inner_of(target).copy_(inner_of(source))
        return target

    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    for operation in ("silu_backward", "mish_backward"):
        kernel = getattr(aten, operation).default
        library.impl(operation, partial(_run_composed, kernel), "PrivateUse1")
    _kept.append(library)


_kept: list[torch.library.Library] = []  # kernels go with their library


MODULE = _register() if available() else Module()
