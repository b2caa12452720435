"""An accelerator computed on the CPU: devices "fake:0", "fake:1", ... with a device's rules.

    with accelerator(devices=2, limit=64_000_000) as machine:
        model.to("fake")
        machine.used[0]  # bytes

What a real device refuses is refused: tensors of different devices in one operation, `numpy()`,
float64 unless allowed (as on Apple's GPUs, where `to("cpu", torch.float64)` of another dtype is
refused too: it converts before it copies), QR, SVD and eigenvectors (which not every kind of device
has in every torch), a device index beyond `devices`, a generator of the host, and memory beyond
`limit` (`torch.OutOfMemoryError`). `torch.accelerator` and `torch.get_device_module("fake")` answer
for it. Results are the CPU's bit for bit with eager
attention; scaled dot product attention takes another of the CPU's kernels unless
`torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` fixes one. It shows nothing of speed, streams or a
real device's rounding.

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

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch
from weakref import WeakValueDictionary

import torch
import torch.utils.backend_registration
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "fake"
UNLIMITED = 1 << 40
"""The memory of a device without a limit, in bytes, for those who ask."""

aten = torch.ops.aten
# Of whole numbers, which the CPU does not count; models ask accelerators for it.
_COUNTS = {aten.histc.default}
_MOVES = {aten._to_copy.default, aten.copy_.default, aten._copy_from.default}
_INDEXES = {
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
}
# Besides the pointwise: a host tensor without dimensions may stand for a number.
_TAKES_NUMBERS = {
    aten.fill_.Tensor,
    aten.fill.Tensor,
    aten.masked_fill.Tensor,
    aten.masked_fill_.Tensor,
    aten.index_fill.int_Tensor,
    aten.index_fill_.int_Tensor,
}
_NOT_EVERYWHERE = {
    aten.linalg_qr.default,
    aten.linalg_pinv.atol_rtol_tensor,
    aten._linalg_svd.default,
    aten._linalg_eigh.default,
    aten._linalg_eigvals.default,
}
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
    _storages: WeakValueDictionary[tuple[int, int], _Storage] = field(
        default_factory=WeakValueDictionary
    )

    @property
    def total(self) -> int:
        """Bytes of each device."""
        return UNLIMITED if self.limit is None else self.limit

    def require(self, dtype: torch.dtype) -> None:
        """Raises TypeError for a dtype that the devices do not have."""
        if dtype in _NOT_ON_DEVICE and not self.float64:
            _refuse(TypeError(f"Cannot convert a {NAME} tensor to {dtype}: no float64 there"))

    def hold(self, tensor: torch.Tensor, index: int) -> _Storage:
        """The storage of a tensor, counted once for as long as anything on the device holds it."""
        if index >= self.devices:
            _refuse(RuntimeError(f"invalid device ordinal: {NAME}:{index} of {self.devices}"))
        self.require(tensor.dtype)
        storage = tensor.untyped_storage()
        key = (storage.data_ptr(), index)
        held = self._storages.get(key)
        if held is None:
            held = self._storages[key] = _Storage(self, index, storage.nbytes())
        return held


def _refuse(error: Exception) -> None:
    """Raises; within a backward pass, after it."""
    if torch._C._current_graph_task_id() == -1:
        raise error
    _present().refused.append(error)


_run_backward = torch.autograd.graph._engine_run_backward


def _run_backward_refusing(*args: Any, **kwargs: Any) -> Any:
    gradients, refused = _run_backward(*args, **kwargs), _present().refused
    if refused:
        error = refused[0]
        refused.clear()
        raise error
    return gradients


class _Storage:
    """Bytes of a device, free again when the last tensor that holds them is gone."""

    def __init__(self, machine: Machine, index: int, size: int) -> None:
        self.machine, self.index, self.size = machine, index, 0
        free = machine.total - machine.used[index]
        if size > free:
            text = f"Tried to allocate {size} bytes; {NAME}:{index} has {machine.total}, of which"
            _refuse(torch.OutOfMemoryError(f"{NAME} out of memory. {text} {free} are free."))
        self.size = size
        machine.used[index] += size
        machine.peak[index] = max(machine.peak[index], machine.used[index])

    def __del__(self) -> None:
        self.machine.used[self.index] -= self.size


_machine: Machine | None = None


def _present() -> Machine:
    if _machine is None:
        raise RuntimeError(f"There is no device {NAME} outside of accelerator()")
    return _machine


class OnDevice(torch.Tensor):
    """A tensor of a device; `inner` is the CPU's tensor that it stands for."""

    inner: torch.Tensor
    index: int
    storage_held: _Storage

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor, index: int) -> OnDevice:
        if inner.is_conj() or inner.is_neg():  # bits that a wrapper does not have
            inner = inner.resolve_conj().resolve_neg()
        held = _present().hold(inner, index)
        wrapper: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device(NAME, index),
        )
        wrapper.inner, wrapper.index, wrapper.storage_held = inner, index, held
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"{self.inner!r} on {self.device}"

    def tolist(self) -> Any:
        """The numbers."""
        return self.inner.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Refused, as on any device."""
        if force:
            return self.inner.numpy(force=True)
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy: use Tensor.cpu()"
        )


def _leaves(value: Any) -> Iterator[Any]:
    """The tensors and generators in arguments; torch's own functions take ten times as long."""
    if isinstance(value, (torch.Tensor, torch.Generator)):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """Arguments or results with `change` applied to each tensor."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)(_mapped(change, item) for item in value)
    return value


def _index(device: object) -> int | None:
    """The index that a device argument names; None for a device of another kind."""
    if device is None:
        return None
    if isinstance(device, int):
        return device
    device = torch.device(device)
    if device.type != NAME:
        return None
    return _present().current if device.index is None else device.index


def _place(value: object) -> str:
    return str(value.device) if isinstance(value, torch.Tensor) else "cpu"


def _require_one_device(func: Any, args: Any, leaves: list[Any]) -> None:
    """Raises RuntimeError where tensors of different devices meet in an operation."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if len({t.index if isinstance(t, OnDevice) else None for t in tensors}) == 1:
        return
    if func in _INDEXES:  # host tensors may index one of the device; a host tensor is not indexed
        indices = {id(t) for t in _leaves(args[1]) if not isinstance(t, OnDevice)}
        tensors = [t for t in tensors if id(t) not in indices]
    if func in _TAKES_NUMBERS or func in _INDEXES or torch.Tag.pointwise in func.tags:
        tensors = [t for t in tensors if t.dim() or isinstance(t, OnDevice)]
    places = sorted({_place(tensor) for tensor in tensors})
    if len(places) > 1:
        text = "Expected all tensors to be on the same device, but found at least two devices, "
        _refuse(RuntimeError(f"{text}{' and '.join(places)}! ({func})"))


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, on whatever devices."""
    leaves = [*_leaves(args), *_leaves(tuple(kwargs.values()))]
    wrapped = [leaf for leaf in leaves if isinstance(leaf, OnDevice)]
    target = _index(kwargs.get("device"))
    if not wrapped and target is None:
        return func(*args, **kwargs)
    if kwargs.get("device") is None and wrapped:
        target = wrapped[0].index
    if wrapped and func in _NOT_EVERYWHERE:
        _refuse(NotImplementedError(f"{func} is not implemented for the device {NAME}"))
    if wrapped and func in _MOVES:
        _require_dtype_of_copy(func, args, kwargs)
    elif wrapped:
        _require_one_device(func, args, leaves)
    if target is not None:
        _require_no_generator(leaves)
        kwargs = dict(kwargs, device=torch.device("cpu")) if kwargs.get("device") else kwargs
    args_inside = _mapped(_inner, args)
    kwargs = {key: _mapped(_inner, value) for key, value in kwargs.items()}
    result = _compute(func, args_inside, kwargs)
    if func is aten.copy_.default:
        return args[0]
    if target is None:
        return result
    of_others = wrapped and func.is_view and not wrapped[0].is_inference()
    if of_others and torch.is_inference_mode_enabled():
        with torch.inference_mode(False):  # a view is what its tensor is, as on any device
            return _wrap(result, target, wrapped)
    return _wrap(result, target, wrapped)


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func in _COUNTS and not args[0].is_floating_point():
        return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
    return func(*args, **kwargs)


def _require_dtype_of_copy(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Raises TypeError where the device would convert to float64 before it copies."""
    source, target = args[0], kwargs.get("dtype")
    if func is not aten._to_copy.default:
        to, source = args[:2] if func is aten.copy_.default else args[1::-1]
        target = to.dtype
    if isinstance(source, OnDevice) and target is not None and target != source.dtype:
        _present().require(target)


def _require_no_generator(leaves: list[Any]) -> None:
    if any(isinstance(leaf, torch.Generator) for leaf in leaves):
        _refuse(RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'"))


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, OnDevice) else value


def _wrap(result: Any, target: int, wrapped: list[OnDevice]) -> Any:
    """The results on their device; what an operation changed in place is the tensor that it was."""
    known = {id(t.inner): t for t in wrapped}

    def place(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, OnDevice):
            return value
        same = known.get(id(value))
        if same is None:
            return OnDevice(value, target)
        if same.shape != value.shape or same.stride() != value.stride():
            raise NotImplementedError("the stand-in changes no shapes in place")
        return same

    return _mapped(place, result)


class _Dispatch(TorchDispatchMode):
    """Factories: operations with a device and without a tensor of it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


_set_data = torch.Tensor.data.__set__


class _Functions(TorchFunctionMode):
    """What does not pass the dispatcher: `torch.tensor(device=)` and `tensor.data = other`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and _index(kwargs.get("device")) is not None:
            device, learned = kwargs.pop("device"), kwargs.pop("requires_grad", False)
            placed = func(*args, **kwargs).to(device)
            return placed.requires_grad_() if learned else placed
        if func == _set_data and all(isinstance(tensor, OnDevice) for tensor in args):
            for attribute in ("inner", "index", "storage_held"):
                setattr(args[0], attribute, getattr(args[1], attribute))
        return func(*args, **kwargs)


class _Module:
    """`torch.get_device_module("fake")`, and `torch.fake`."""

    def is_initialized(self) -> bool:
        return _machine is not None

    def is_available(self) -> bool:
        return _machine is not None

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def device_count(self) -> int:
        return 0 if _machine is None else _machine.devices

    def current_device(self) -> int:
        return _present().current

    def set_device(self, device: object) -> None:
        _present().current = _index(device) or 0

    def get_device_name(self, device: object = None) -> str:
        return "Stand-in accelerator"

    def synchronize(self, device: object = None) -> None:
        _present().synchronised += 1

    def empty_cache(self) -> None:
        if _machine is not None:
            _machine.freed += 1

    def memory_allocated(self, device: object = None) -> int:
        return _present().used[self._index(device)]

    def max_memory_allocated(self, device: object = None) -> int:
        return _present().peak[self._index(device)]

    memory_reserved = memory_allocated
    max_memory_reserved = max_memory_allocated

    def reset_peak_memory_stats(self, device: object = None) -> None:
        index = self._index(device)
        _present().peak[index] = _present().used[index]

    def mem_get_info(self, device: object = None) -> tuple[int, int]:
        machine, index = _present(), self._index(device)
        return machine.total - machine.used[index], machine.total

    def _index(self, device: object) -> int:
        index = _index(device)
        return _present().current if index is None else index

    def _stats(self, device: int) -> dict[str, Any]:
        kinds = {
            "current": self.memory_allocated(device),
            "peak": self.max_memory_allocated(device),
        }
        return {name: {"all": kinds} for name in ("allocated_bytes", "reserved_bytes")}

    def _exchange(self, index: int) -> int:
        before, _present().current = _present().current, index
        return before


def _bindings(module: _Module) -> dict[str, Callable[..., Any]]:
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
    return present is None or present.type == NAME


def _register() -> _Module:
    """Makes the kind of device known to torch, for the rest of the process."""
    registration: Any = torch.utils.backend_registration

    class Hook(torch._C._acc.PrivateUse1Hooks):
        def is_available(self) -> bool:
            return _machine is not None

        def has_primary_context(self, index: int) -> bool:
            return True

        def is_built(self) -> bool:
            return True

    module = _Module()
    registration._setup_privateuseone_for_python_backend(NAME, module, Hook())
    _kernels()
    return module


def _run_composed(kernel: Any, *args: Any) -> Any:
    return _run(kernel, args, {})


def _kernels() -> None:
    """Kernels for what torch makes below Python's modes."""
    library = torch.library.Library("aten", "IMPL")

    def empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
        return OnDevice(torch.empty_strided(size, stride, dtype=dtype), _index(device) or 0)

    def empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
        return OnDevice(torch.empty(size, dtype=dtype), _index(device) or 0)

    def copy_from(source, target, non_blocking=False):
        _inner(target).copy_(_inner(source))
        return target

    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    for operation in ("silu_backward", "mish_backward"):
        kernel = getattr(aten, operation).default
        library.impl(operation, partial(_run_composed, kernel), "PrivateUse1")
    _kept.append(library)


_kept: list[torch.library.Library] = []  # kernels go with their library


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
    global _machine
    assert available(), "skip the test where `available()` is false"
    before = _machine
    _machine = Machine(devices, float64, limit)
    future = torch.__future__
    with ExitStack() as stack:
        stack.callback(_restore, before)
        stack.callback(
            future.set_swap_module_params_on_conversion,
            future.get_swap_module_params_on_conversion(),
        )
        future.set_swap_module_params_on_conversion(True)
        for name, function in _bindings(_MODULE).items():
            if hasattr(torch._C, name):
                stack.enter_context(patch.object(torch._C, name, function))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(
            patch.object(torch.autograd, "_engine_run_backward", _run_backward_refusing)
        )
        stack.enter_context(_Functions())
        stack.enter_context(_Dispatch())
        yield _machine


def _restore(before: Machine | None) -> None:
    global _machine
    _machine = before


_MODULE = _register() if available() else _Module()
