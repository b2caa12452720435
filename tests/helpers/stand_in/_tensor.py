"""Tensors of a device, and the operations on them: checked, computed on the CPU, wrapped again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.stand_in._machine import NAME, Storage, present, refuse

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


class OnDevice(torch.Tensor):
    """A tensor of a device; `inner` is the CPU's tensor that it stands for."""

    inner: torch.Tensor
    index: int
    storage_held: Storage

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor, index: int = -1, requires_grad: bool = False) -> Any:
        if index < 0:  # accelerate makes parameters of the class that the one before had
            return torch.nn.Parameter(inner, requires_grad)
        if inner.is_conj() or inner.is_neg():  # bits that a wrapper does not have
            inner = inner.resolve_conj().resolve_neg()
        held = present().hold(inner, index)
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
        return run(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"{self.inner!r} on {self.device}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo[id(self)] = self.clone()
        return copied

    def data_ptr(self) -> int:
        """The address, by which accelerate knows tied parameters."""
        return self.inner.data_ptr()

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


def index_of(device: object) -> int | None:
    """The index that a device argument names; None for a device of another kind."""
    if device is None:
        return None
    if isinstance(device, int):
        return device
    device = torch.device(device)
    if device.type != NAME:
        return None
    return present().current if device.index is None else device.index


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, on whatever devices."""
    leaves = [*_leaves(args), *_leaves(tuple(kwargs.values()))]
    wrapped = [leaf for leaf in leaves if isinstance(leaf, OnDevice)]
    target = index_of(kwargs.get("device"))
    if not wrapped and target is None:
        return func(*args, **kwargs)
    if func is aten._has_compatible_shallow_copy_type.default:
        return len(wrapped) == 2
    if kwargs.get("device") is None and wrapped:
        target = wrapped[0].index
    if wrapped and func in _NOT_EVERYWHERE:
        refuse(NotImplementedError(f"{func} is not implemented for the device {NAME}"))
    if wrapped and func in _MOVES:
        _require_dtype_of_copy(func, args, kwargs)
    elif wrapped:
        _require_one_device(func, args, leaves)
    if target is not None:
        _require_no_generator(leaves)
        kwargs = dict(kwargs, device=torch.device("cpu")) if kwargs.get("device") else kwargs
    args_inside = _mapped(inner_of, args)
    kwargs = {key: _mapped(inner_of, value) for key, value in kwargs.items()}
    result = _compute(func, args_inside, kwargs)
    if func is aten.copy_.default:
        return args[0]
    if target is None:
        return result
    of_others = wrapped and func.is_view and not wrapped[0].is_inference()
    if of_others and torch.is_inference_mode_enabled():
        with torch.inference_mode(False):  # a view is what its tensor is, as on any device
            return _wrap(result, target, wrapped)
    # in inference mode `to` is one operation, which copies nothing from the host to the host
    if any(result is leaf for leaf in leaves):
        result = result.clone()
    return _wrap(result, target, wrapped)


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
        refuse(RuntimeError(f"{text}{' and '.join(places)}! ({func})"))


def _require_dtype_of_copy(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Raises TypeError where the device would convert to float64 before it copies."""
    source, target = args[0], kwargs.get("dtype")
    if func is not aten._to_copy.default:
        to, source = args[:2] if func is aten.copy_.default else args[1::-1]
        target = to.dtype
    if isinstance(source, OnDevice) and target is not None and target != source.dtype:
        present().require(target)


def _require_no_generator(leaves: list[Any]) -> None:
    if any(isinstance(leaf, torch.Generator) for leaf in leaves):
        refuse(RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'"))


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func in _COUNTS and not args[0].is_floating_point():
        return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
    return func(*args, **kwargs)


def inner_of(value: Any) -> Any:
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
        if same.index != target:  # `to` in inference mode, from device to device
            return OnDevice(value.clone(), target)
        if same.shape != value.shape or same.stride() != value.stride():
            raise NotImplementedError("the stand-in changes no shapes in place")
        return same

    return _mapped(place, result)


class Dispatch(TorchDispatchMode):
    """Factories: operations with a device and without a tensor of it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


_set_data = torch.Tensor.data.__set__


class Functions(TorchFunctionMode):
    """What does not pass the dispatcher: `torch.tensor(device=)` and `tensor.data = other`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and index_of(kwargs.get("device")) is not None:
            device, learned = kwargs.pop("device"), kwargs.pop("requires_grad", False)
            placed = func(*args, **kwargs).to(device)
            return placed.requires_grad_() if learned else placed
        if func == _set_data and all(isinstance(tensor, OnDevice) for tensor in args):
            for attribute in ("inner", "index", "storage_held"):
                setattr(args[0], attribute, getattr(args[1], attribute))
        return func(*args, **kwargs)
