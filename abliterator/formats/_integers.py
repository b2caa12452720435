"""Integers of 4 and 8 bits recognised: compressed-tensors, GPTQ and AWQ.

Written from what the formats' own tools do: compressed-tensors' `pack_quantized/helpers.py`,
GPTQModel's `nn_modules/qlinear/__init__.py` (`pack_original`), AutoAWQ's `modules/linear/gemm.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from abliterator.errors import UnsupportedModel
from abliterator.formats._groups import weights_of
from abliterator.formats._layout import Layout, Shape
from abliterator.formats._numbers import FORMATS
from abliterator.formats._packed import (
    AWQ_ORDER,
    IN_TURN,
    WORD_BITS,
    IntegerLayout,
    Part,
)
from abliterator.formats._patterns import matches
from abliterator.formats._scheme import Headers, Settings, misfit

BITS = (4, 8)
_INSIDE = r"(\..*)?"  # all experts' own modules, too


def compressed_integers(name: str, headers: Headers, settings: Settings) -> Layout | None:
    """Integers of compressed-tensors: packed in `weight_packed`, or one a byte in `weight`."""
    header = headers[name]
    module, _, ending = name.rpartition(".")
    if header.dtype != {"weight_packed": "I32", "weight": "I8"}.get(ending):
        return None
    weights = weights_of(module, settings)
    stored = ("int-quantized", "naive-quantized") if ending == "weight" else ("pack-quantized",)
    if weights is None or weights.get("format") not in stored or weights.get("type") != "int":
        raise misfit(name, header, "and config.json says that it is not quantised in that way")
    bits = _bits(name, weights.get("num_bits"))
    scale = _part(name, headers, "scale", f"{module}.weight_scale")
    if scale is None or len(header.shape) != 2:
        raise misfit(name, header, "without a matrix [out, in] and its scales weight_scale")
    per_word = 1 if ending == "weight" else WORD_BITS // bits
    rows, held = header.shape[0], header.shape[1] * per_word
    kind, group, columns = _grouped(scale.shape, rows, held, weights)
    if not kind or scale.dtype not in FORMATS or -(-columns // per_word) != header.shape[1]:
        raise misfit(name, header, _no_fit(scale, weights.get("group_size")))
    n_groups = -(-columns // group)
    zero = _compressed_zeros(name, headers, module, (rows, n_groups), bits, weights)
    parts = [scale, zero]
    parts += [_part(name, headers, "order", f"{module}.weight_g_idx", "I32", (columns,))]
    parts += [_part(name, headers, "shape", f"{module}.weight_shape", ("I64", "I32"), (2,))]
    return IntegerLayout.of(
        name,
        header,
        parts,
        plain_name=f"{module}.weight",
        plain_shape=(rows, columns),
        group=group,
        kind=f"int{bits}, a scale a {kind}",
        bits=bits,
        zero_bits=bits if zero is not None and zero.dtype == "I32" else 0,
    )


def gptq(name: str, headers: Headers, settings: Settings) -> Layout | None:
    """GPTQ: `qweight` [in / 8, out], `qzeros` [groups, out / 8], `scales` and perhaps `g_idx`."""
    return _in_first(name, headers, _of_module(name, settings), awq_order=False)


def awq(name: str, headers: Headers, settings: Settings) -> Layout | None:
    """AWQ for GEMM kernels: `qweight` [in, out / 8], `qzeros` [groups, out / 8], `scales`."""
    return _in_first(name, headers, settings, awq_order=True)


def is_gptq(settings: Settings) -> bool:
    """Whether tensors are laid out as GPTQ's own tools do, not for one kernel."""
    layout = settings.get("checkpoint_format") or "gptq"
    return layout in ("gptq", "gptq_v2") and not settings.get("is_marlin_format")


def is_awq(settings: Settings) -> bool:
    """Whether tensors are laid out for GEMM kernels, as almost all are."""
    return str(settings.get("version") or "gemm").lower() == "gemm"


def gptq_without(
    settings: Settings, plain: Sequence[str], quantised: Sequence[str]
) -> dict[str, Any]:
    """The settings when some modules are plain: a rule for GPTQModel and vLLM, a list for optimum.

    GPTQModel and vLLM leave alone what a pattern of `dynamic` that begins with "-:" matches, and
    the first that matches counts; optimum quantises what `modules_in_block_to_quantize` lists.
    """
    rules: dict[str, Any] = {
        f"-:^{re.escape(module)}{_INSIDE if module.endswith('.experts') else ''}$": {}
        for module in plain
    }
    dynamic = settings.get("dynamic")
    return {
        "dynamic": {**rules, **(dynamic if isinstance(dynamic, Mapping) else {})},
        "modules_in_block_to_quantize": [list(quantised)],
    }


def _of_module(name: str, settings: Settings) -> Settings:
    """The settings of one module: the first pattern of `dynamic` that matches may have its own."""
    dynamic = settings.get("dynamic")
    module = name.rpartition(".")[0]
    for pattern, own in dynamic.items() if isinstance(dynamic, Mapping) else ():
        sign, _, rest = str(pattern).partition(":")
        expression = rest if sign in ("+", "-") else str(pattern)
        if matches(expression, module):
            excluded = {"excluded": True} if sign == "-" else {}
            return {**settings, **(own if isinstance(own, Mapping) else {}), **excluded}
    return settings


def _in_first(name: str, headers: Headers, settings: Settings, *, awq_order: bool) -> Layout | None:
    module, _, ending = name.rpartition(".")
    if ending != "qweight":
        return None
    header = headers[name]
    if settings.get("excluded"):
        raise misfit(name, header, "and config.json lists its module as not quantised (`dynamic`)")
    bits = _bits(name, settings.get("bits", settings.get("w_bit")))
    per_word = WORD_BITS // bits
    scale = _part(name, headers, "scale", f"{module}.scales")
    if header.dtype != "I32" or len(header.shape) != 2 or scale is None:
        raise misfit(name, header, "without words of 32 bits in two dimensions, and scales")
    words, across = header.shape
    columns, rows = (words, across * per_word) if awq_order else (words * per_word, across)
    size = settings.get("group_size", settings.get("q_group_size"))
    group = columns if size == -1 else size
    if (
        type(group) is not int
        or group < 1
        or scale.dtype not in FORMATS
        or scale.shape != (-(-columns // group), rows)
    ):
        raise misfit(name, header, _no_fit(scale, size))
    zeros = (scale.shape[0], -(-rows // per_word))
    zero = _part(name, headers, "zero", f"{module}.qzeros", "I32", zeros)
    if zero is None:
        raise misfit(name, header, f"without its zero points {module}.qzeros")
    order = _part(name, headers, "order", f"{module}.g_idx", "I32", (columns,))
    if awq_order and order is not None:
        raise misfit(name, header, f"beside {order.name}, which GPTQ has and AWQ has not")
    return IntegerLayout.of(
        name,
        header,
        (scale, zero, order),
        plain_name=f"{module}.weight",
        plain_shape=(rows, columns),
        group=group,
        kind=f"int{bits}, a scale a {'row' if group >= columns else 'group'}",
        bits=bits,
        turned=True,
        along_out=awq_order,
        places=AWQ_ORDER if awq_order else IN_TURN,
        zero_bits=bits,
        zero_offset=0 if awq_order or settings.get("checkpoint_format") == "gptq_v2" else 1,
    )


def _bits(name: str, bits: object) -> int:
    if type(bits) is int and bits in BITS:
        return bits
    raise UnsupportedModel(
        f"config.json says that {name} holds integers of {bits!r} bits; 4 or 8 were expected. Edit "
        "the model that it was made from in bfloat16, and quantise the edited one again."
    )


def _part(
    owner: str,
    headers: Headers,
    role: str,
    name: str,
    dtypes: str | tuple[str, ...] = (),
    shape: Shape | None = None,
) -> Part | None:
    """A tensor beside another; None if it is not there.

    Raises:
        UnsupportedModel: for another dtype or shape than expected.
    """
    header = headers.get(name)
    if header is None:
        return None
    dtypes = (dtypes,) if isinstance(dtypes, str) else dtypes
    if (dtypes and header.dtype not in dtypes) or (shape is not None and header.shape != shape):
        raise misfit(
            owner,
            headers[owner],
            f"beside {name} ({header.dtype}, {list(header.shape)}), where {' or '.join(dtypes)}"
            f"{'' if shape is None else f', {list(shape)}'} was expected",
        )
    return Part(role, name, header.dtype, header.shape)


def _grouped(
    scales: Shape, rows: int, held: int, weights: Mapping[str, Any]
) -> tuple[str, int, int]:
    """What shares a scale, how many numbers of a row do, and the row's length; "" for no fit."""
    size, strategy = weights.get("group_size"), weights.get("strategy")
    grouped = isinstance(size, int) and size > 0
    strategy = strategy or ("group" if grouped else "channel" if size == -1 else "tensor")
    if strategy == "group" and isinstance(size, int) and size > 0 and scales[:-1] == (rows,):
        columns = min(scales[1] * size, held)
        return ("group" if -(-columns // size) == scales[1] else ""), size, columns
    if strategy == "channel" and scales in ((rows, 1), (rows,)):
        return "row", held, held
    if strategy == "tensor" and math.prod(scales) == 1:
        return "tensor", held, held
    return "", 1, held


def _compressed_zeros(
    name: str,
    headers: Headers,
    module: str,
    shape: Shape,
    bits: int,
    weights: Mapping[str, Any],
) -> Part | None:
    """Zero points [out, groups], of which words hold several along the outputs, or bytes one."""
    stored = f"{module}.weight_zero_point"
    if weights.get("symmetric", True):
        if stored in headers:
            raise misfit(name, headers[name], f"beside {stored}, and config.json says symmetric")
        return None
    rows, groups = shape
    packed = name.endswith("_packed")
    dtype, expected = ("I32", (-(-rows * bits // WORD_BITS), groups)) if packed else ("I8", shape)
    zero = _part(name, headers, "zero", stored, dtype, expected)
    if zero is None:
        raise misfit(name, headers[name], f"without {stored}, and config.json says not symmetric")
    return zero


def _no_fit(scale: Part, size: object) -> str:
    return (
        f"with scales {scale.name} ({scale.dtype}, {list(scale.shape)}), which do not fit the "
        f"group size {size!r} that config.json gives"
    )
