"""An accelerator computed on the CPU: devices "fake:0", "fake:1", ... with a device's rules.

    with accelerator(devices=2, limit=64_000_000) as machine:
        model.to("fake")
        machine.used[0]  # bytes

What a real device refuses is refused: tensors of different devices in one operation, `numpy()`,
float64 unless allowed (as on Apple's GPUs, where `to("cpu", torch.float64)` of another dtype is
refused too: it converts before it copies), QR, SVD and eigenvectors (which not every kind of device
has in every torch), a device index beyond `devices`, a generator of the host, and memory beyond
`limit` (`torch.OutOfMemoryError`). `torch.accelerator` and `torch.get_device_module("fake")` answer
for it. Results are the CPU's bit for bit with eager attention; scaled dot product attention takes
another of the CPU's kernels unless `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` fixes one. It
shows nothing of speed, streams or a real device's rounding.

A tensor of the device is a wrapper around one of the CPU. Operations reach `__torch_dispatch__`,
which checks the rules, computes on the wrapped tensors and wraps the results.

- `torch.tensor` may not be replaced: torch's device contexts recognise factories by identity. A
  function mode sees the call after them.
- A list as an index becomes a tensor below Python's modes, so `empty_strided` and `_copy_from` need
  kernels. The gradients of SiLU and Mish do too: without, torch composes them of other operations,
  which round otherwise than the CPU's kernels.
- `Module.to` sets the data of a parameter, which a wrapper cannot give to a tensor of the host, and
  tied parameters made anew would be two: they are swapped instead.
- The autograd engine has a thread for each device, which it counts when it is first used, and of a
  backend in Python it sees one. So gradients are computed in the calling thread. What Python raises
  there ends the process (in the destructor of a guard): it is raised after the pass.
- Torch lets a backend in Python not take part in `torch.accelerator.synchronize`, `empty_cache` and
  the memory figures: their bindings are replaced while the devices exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch

from tests.helpers.stand_in._backend import MODULE, available, bindings
from tests.helpers.stand_in._machine import (
    NAME,
    PRESENT,
    UNLIMITED,
    Machine,
    run_backward_refusing,
)
from tests.helpers.stand_in._tensor import Dispatch, Functions, OnDevice

__all__ = ["NAME", "UNLIMITED", "Machine", "OnDevice", "accelerator", "available"]


@contextmanager
def accelerator(
    *, devices: int = 1, float64: bool = False, limit: int | None = None
) -> Iterator[Machine]:
    """Has devices "fake:0", "fake:1", ... while it lasts.

    Args:
        devices: their number.
        float64: whether they have it.
        limit: bytes of each device.
    """
    assert available(), "skip the test where `available()` is false"
    before, PRESENT.machine = PRESENT.machine, Machine(devices, float64, limit)
    future = torch.__future__
    with ExitStack() as stack:
        stack.callback(_restore, before)
        stack.callback(
            future.set_swap_module_params_on_conversion,
            future.get_swap_module_params_on_conversion(),
        )
        future.set_swap_module_params_on_conversion(True)
        for name, function in bindings(MODULE).items():
            if hasattr(torch._C, name):
                stack.enter_context(patch.object(torch._C, name, function))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(
            patch.object(torch.autograd, "_engine_run_backward", run_backward_refusing)
        )
        stack.enter_context(Functions())
        stack.enter_context(Dispatch())
        yield PRESENT.machine


def _restore(before: Machine | None) -> None:
    PRESENT.machine = before
