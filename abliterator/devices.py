"""The devices that can compute: which this machine has, their memory, and how its shortage shows.

`torch.accelerator` knows the kind of accelerator, of which a machine has one (CUDA, also for AMD's
ROCm; Apple's MPS; Intel's XPU); names and memory come from the kind's own module (`torch.cuda`,
`torch.mps`, `torch.xpu`).
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from abliterator.errors import GenerationError, RecipeError

AUTO, BALANCED = "auto", "balanced"  # devices to be chosen
CPU = "cpu"

# Parts of messages, in lower case, by which a lack of memory is known where it has no error type:
# drivers and libraries of CUDA, HIP, MPS and XPU, and the CPU's allocator on each system.
_SHORTAGE = (
    "out of memory",
    "outofmemory",
    "_alloc_failed",
    "out_of_device_memory",
    "out_of_host_memory",
    "out_of_resources",
    "invalid buffer size",
    "can't allocate memory",
    "not enough memory",
)

# Files of Linux: NVIDIA's, NVIDIA's and Intel's under WSL, AMD's, Intel's.
_ACCELERATORS = ("nvidia[0-9]*", "dxg", "kfd", "dri/renderD*")

# Share of a device's free memory that weights may take; the rest is for keys and values,
# activations and logits.
WEIGHTS_SHARE = 0.85


class Memory(NamedTuple):
    """Memory of a device, in bytes."""

    free: int
    total: int


def available_devices() -> list[str]:
    """Names of the devices that torch can use on this machine: accelerators, then "cpu"."""
    import torch

    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or not torch.accelerator.is_available():
        return [CPU]
    return [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())] + [CPU]


def accelerator_is_possible() -> bool:
    """Whether this machine may have an accelerator that torch can use, without importing torch.

    False is certain: a torch without support for any, or no device of the kernel's.
    """
    if "torch" in sys.modules:
        return available_devices() != [CPU]
    with suppress(PackageNotFoundError):
        if version("torch").endswith("+cpu"):
            return False
    if platform.system() != "Linux":
        return platform.system() != "Darwin" or platform.machine() == "arm64"
    return any(next(Path("/dev").glob(pattern), None) for pattern in _ACCELERATORS)


def choose_device(name: str) -> str:
    """The device of this machine that `name` means, as torch names it.

    Args:
        name: of a device as torch names it ("cpu", "cuda", "cuda:1", "mps", "xpu"), or "auto": the
            accelerator, and the CPU where there is none.

    Raises:
        RecipeError: if this machine has no such device.
    """
    import torch

    devices = available_devices()
    if name == AUTO:
        return torch.device(devices[0]).type
    with suppress(RuntimeError):  # not a name of torch's
        device = torch.device(name)
        if f"{device.type}:{device.index or 0}" in {*devices, f"{CPU}:0"}:
            return name
    raise RecipeError(
        f"This machine has no device {name!r}: torch {torch.__version__} can use "
        f"{', '.join(devices)}. Choose one of these, or `auto`."
    )


def device_name(device: str) -> str:
    """The product name of a device, or what its driver calls it."""
    import torch

    kind = torch.device(device).type
    if kind == CPU:
        return f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    if kind == "mps":
        return getattr(torch.backends.mps, "get_name", lambda: kind)()  # not in torch 2.6
    return str(torch.get_device_module(device).get_device_name(device))


def device_memory(device: str) -> Memory:
    """Free and total memory of a device.

    On an Apple GPU, which shares the host's, what Metal recommends to use at most is the total.
    """
    if device == CPU or device.startswith(f"{CPU}:"):
        import psutil

        memory = psutil.virtual_memory()
        return Memory(memory.available, memory.total)
    import torch

    module = torch.get_device_module(device)
    if hasattr(module, "recommended_max_memory"):
        total = int(module.recommended_max_memory())
        return Memory(max(0, total - int(module.driver_allocated_memory())), total)
    free, total = module.mem_get_info(device)
    return Memory(int(free), int(total))


def usable_cores() -> int | None:
    """Number of processor cores that this process may use; None if the system does not say."""
    affinity = getattr(os, "sched_getaffinity", None)  # on Linux alone
    return len(affinity(0)) if affinity else os.cpu_count()


def weight_room(free: Mapping[str, int], max_memory: int | None = None) -> dict[str, int]:
    """Bytes of weights that each device may hold, of those that are free."""
    room = {device: int(WEIGHTS_SHARE * size) for device, size in free.items()}
    return {device: min(size, max_memory or size) for device, size in room.items()}


def worker_count(each: int) -> int:
    """How many workers run at once on the host: one a core, while they fit in half of what is free.

    Args:
        each: bytes of memory that a worker needs.
    """
    import psutil

    return max(1, min(usable_cores() or 1, psutil.virtual_memory().available // 2 // max(1, each)))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had too little memory.

    Only torch's own allocators raise an error type for that; errors of drivers, of libraries and of
    the CPU's allocator are recognised by their messages.
    """
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in message for words in _SHORTAGE)


@contextmanager
def enough_memory(what: str, *, smaller: str = "") -> Iterator[None]:
    """Converts a lack of memory in the block to an error that says what to choose.

    Args:
        what: what needs the memory, the subject of a sentence: "The model in FOLDER".
        smaller: what may be made smaller beside the dtype: "a smaller `tuning.batch`".

    Raises:
        GenerationError: chained to what was raised.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        choices = [
            "a smaller dtype (`--dtype bfloat16`)",
            smaller,
            "a device with more memory",
            "less of it for weights (`--device auto --max-memory SIZE` spreads the model)",
        ]
        raise GenerationError(
            f"{what} does not fit in memory: {reason}. Use {', '.join(filter(None, choices))}, or "
            "`--device cpu`."
        ) from error


def release_memory() -> None:
    """Frees cached device and host memory; call it after the last reference to a model is gone.

    glibc keeps freed memory for later, so part of a released model would stay with the process
    while the next one is loaded.
    """
    import torch

    gc.collect()
    accelerator, *_ = available_devices()
    if accelerator != CPU:
        torch.get_device_module(accelerator).empty_cache()
    if sys.platform == "linux":
        with suppress(AttributeError):  # other C libraries have no such call, and no need of it
            ctypes.CDLL(None).malloc_trim(0)
