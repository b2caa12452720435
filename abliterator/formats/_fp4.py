"""NVFP4 recognised, as compressed-tensors and NVIDIA's ModelOpt store it.

FP4 numbers in bytes of two, an FP8 scale for each 16 numbers of a row, and one number for the
tensor, which the two define the other way round: compressed-tensors *divides* by its
`weight_global_scale` (compressed_tensors/quantization/lifecycle/forward.py, `_dequantize`),
ModelOpt *multiplies* by its `weight_scale_2` (modelopt/torch/quantization/qtensor/nvfp4_tensor.py).
"""

from __future__ import annotations

import math
from typing import Any

from abliterator.formats._groups import weights_of
from abliterator.formats._layout import Layout
from abliterator.formats._numbers import F8_E4M3
from abliterator.formats._packed import Fp4Layout, Part
from abliterator.formats._scheme import Headers, Settings, misfit

GROUP = 16
_ALGORITHMS = ("NVFP4", "W4A16_NVFP4")


def compressed_nvfp4(name: str, headers: Headers, settings: Settings) -> Layout | None:
    """NVFP4 of compressed-tensors, in `weight_packed`."""
    module, _, ending = name.rpartition(".")
    if ending != "weight_packed" or headers[name].dtype != "U8":
        return None
    weights = weights_of(module, settings)
    if (
        weights is None
        or weights.get("format") != "nvfp4-pack-quantized"
        or weights.get("group_size", GROUP) != GROUP
        or not weights.get("symmetric", True)
    ):
        raise misfit(name, headers[name], "and config.json does not say that it is NVFP4")
    return _nvfp4(name, headers, ("divisor", f"{module}.weight_global_scale"))


def modelopt_nvfp4(name: str, headers: Headers, settings: Settings) -> Layout | None:
    """NVFP4 of ModelOpt, in `weight`."""
    if not name.endswith(".weight") or headers[name].dtype != "U8":
        return None
    return _nvfp4(name, headers, ("unit", f"{name}_scale_2"))


def is_modelopt(settings: Settings) -> bool:
    """Whether all that is quantised is NVFP4, with no further factor on what a module reads."""
    inner = settings.get("quantization")
    stated: Any = inner if isinstance(inner, dict) else settings
    return str(stated.get("quant_algo")).upper() in _ALGORITHMS


def _nvfp4(name: str, headers: Headers, whole: tuple[str, str]) -> Layout:
    header, module = headers[name], name.rpartition(".")[0]
    scale, one = headers.get(f"{module}.weight_scale"), headers.get(whole[1])
    if scale is None or one is None or len(header.shape) != 2:
        raise misfit(name, header, f"without {module}.weight_scale or {whole[1]}, as NVFP4 has")
    rows, columns = header.shape[0], 2 * header.shape[1]
    if columns % GROUP or (scale.dtype, scale.shape) != (F8_E4M3.name, (rows, columns // GROUP)):
        raise misfit(
            name,
            header,
            f"beside {module}.weight_scale ({scale.dtype}, {list(scale.shape)}), where "
            f"{F8_E4M3.name}, one for {GROUP} numbers of a row, was expected",
        )
    if one.dtype != "F32" or math.prod(one.shape) != 1:
        raise misfit(
            name, header, f"beside {whole[1]} ({one.dtype}, {list(one.shape)}), not one F32"
        )
    parts = (
        Part("scale", f"{module}.weight_scale", scale.dtype, scale.shape),
        Part(*whole, one.dtype, one.shape),
    )
    return Fp4Layout.of(
        name,
        header,
        parts,
        plain_name=f"{module}.weight",
        plain_shape=(rows, columns),
        group=GROUP,
        kind="NVFP4",
    )
