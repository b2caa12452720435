"""Imports packages and computes on every device, in a process that may end without an exception.

One JSON object a line on stdout: `begin` names what is tried next, every other is a result. The
parent learns from the last `begin` where a process that crashed was.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from typing import Any

from abliterator.diagnostics._faults import described, outcome

IMPORTED = ("torch", "transformers", "datasets", "lm_eval")
DTYPES = ("float32", "bfloat16", "float16", "float64")
_SIZE = 64  # sums of this many values of -1, 0 and 1 are exact in every dtype


def main() -> None:
    """Prints every result as soon as it is there."""
    for result in results():
        print(json.dumps(result), flush=True)  # noqa: T201


def results() -> Iterator[dict[str, Any]]:
    """What is tried, and what came of it."""
    for name in IMPORTED:
        yield {"begin": f"importing {name}"}
        yield {"import": name, "outcome": outcome(importlib.import_module, name)}
    yield {"begin": "looking for devices"}
    try:
        yield {"torch_build": _torch_build()}
        devices = _available_devices()
    except Exception as error:  # noqa: BLE001 - a torch that does not work
        yield {"fault": f"devices: {described(error)}"}
        return
    for device in sorted(devices, key=lambda name: name != "cpu"):  # what crashes least comes first
        yield from device_results(device)


def device_results(device: str) -> Iterator[dict[str, Any]]:
    """The name and memory of a device, and a matrix product on it in every dtype."""
    from abliterator.devices import device_memory, device_name

    yield {"begin": f"opening {device}", "device": device}
    try:
        yield {"device": device, "product": device_name(device)}
        free, total = device_memory(device)
        yield {"device": device, "free": free, "total": total}
    except Exception as error:  # noqa: BLE001 - whatever a driver does
        yield {"fault": f"{device}: {described(error)}"}
    for dtype in DTYPES:
        yield {"begin": f"a matrix product in {dtype} on {device}"}
        product = outcome(_multiply, device, dtype)
        yield {"device": device, "dtype": dtype, "outcome": product}


def _available_devices() -> list[str]:
    from abliterator.devices import available_devices

    return available_devices()


def _torch_build() -> str:
    from torch import backends, version

    for attribute, platform in (("cuda", "CUDA"), ("hip", "ROCm"), ("xpu", "XPU")):
        if built_for := getattr(version, attribute, None):
            return f"{platform} {built_for}"
    return "MPS" if backends.mps.is_built() else "CPU"


def _multiply(device: str, dtype: str) -> None:
    import torch

    matrix = torch.arange(_SIZE * _SIZE, dtype=torch.float64).remainder(3).sub(1)
    matrix = matrix.view(_SIZE, _SIZE)
    there = matrix.to(device, getattr(torch, dtype))  # fails where the device has no such dtype
    product = (there @ there.T).cpu().to(torch.float64)
    if not torch.equal(product, matrix @ matrix.T):
        raise ArithmeticError("the product is wrong")


if __name__ == "__main__":
    main()
