"""FP8 and MXFP4 recognised: weights of whole bytes beside tensors of scales."""

from __future__ import annotations

import math

from abliterator.errors import UnsupportedModel
from abliterator.formats._groups import groups_of
from abliterator.formats._layout import Layout, Mxfp4Layout, ScaledLayout, Shape
from abliterator.formats._numbers import F8_E4M3, MXFP4_GROUP, SCALE_DTYPES
from abliterator.formats._packed import Fp4Layout, Part
from abliterator.formats._scheme import Headers, Settings, misfit


def fp8(name: str, headers: Headers, settings: Settings) -> Layout | None:
    """FP8 as DeepSeek and Qwen store it: scales in `weight_scale_inv`, by blocks or one for all.

    DeepSeek V4 has them in `scale`, and there the numbers of its experts are FP4, two in a byte.
    """
    scales, beside = f"{name}_scale_inv", f"{name.removesuffix('weight')}scale"
    if name.endswith(".weight") and scales not in headers and beside in headers:
        scales = beside
    if headers[name].dtype == "I8" and scales in headers:
        return _fp4_rows(name, headers, scales)
    return _scaled(name, headers, scales, settings.get("weight_block_size"))


def _fp4_rows(name: str, headers: Headers, scales: str) -> Layout:
    """A matrix of MXFP4 numbers, [out, in / 2] beside powers of two [out, in / 32]."""
    header, scale = headers[name], headers[scales]
    rows, columns = header.shape[0], 2 * header.shape[-1]
    fits = len(header.shape) == 2 and scale.shape == (rows, columns / MXFP4_GROUP)
    if not fits or scale.dtype not in ("F8_E8M0", "U8"):
        raise misfit(
            name,
            header,
            f"with scales {scales} ({scale.dtype}, {list(scale.shape)}), where F8_E8M0, one for "
            f"{MXFP4_GROUP} numbers of a row, was expected",
        )
    return Fp4Layout.of(
        name,
        header,
        (Part("scale", scales, scale.dtype, scale.shape),),
        plain_name=name,
        plain_shape=(rows, columns),
        group=MXFP4_GROUP,
        kind="MXFP4",
    )


def compressed_fp8(name: str, headers: Headers, settings: Settings) -> Layout | None:
    """FP8 of compressed-tensors: `weight_scale` for a tensor, each row, or blocks."""
    groups = [group.get("weights") or {} for group in groups_of(settings)]
    blocks = [group["block_structure"] for group in groups if group.get("block_structure")]
    return _scaled(name, headers, f"{name}_scale", blocks[0] if blocks else None)


def mxfp4(name: str, headers: Headers, settings: Settings) -> Layout | None:
    if not name.endswith("_blocks"):
        return None
    header, weight_name = headers[name], name.removesuffix("_blocks")
    scales = f"{weight_name}_scales"
    fits = (
        scales in headers
        and (headers[scales].dtype, headers[scales].shape) == ("U8", header.shape[:-1])
        and (header.dtype, len(header.shape), header.shape[-1:]) == ("U8", 4, (16,))
    )
    if not fits:
        raise UnsupportedModel(
            f"Tensor {name} ({header.dtype}, {list(header.shape)}) is not stored as MXFP4 is: "
            f"U8 [experts, d_model, blocks, 16] beside {scales}, U8 [experts, d_model, blocks]. "
            "Download the model again, or use its bfloat16 checkpoint."
        )
    return Mxfp4Layout(name, header.dtype, header.shape, (scales,), weight_name)


def _scaled(name: str, headers: Headers, scales: str, block: object) -> Layout | None:
    header, scale = headers[name], headers.get(scales)
    if header.dtype != F8_E4M3.name:
        return None
    if scale is None:
        raise misfit(name, header, f"without its scales {scales}")
    fit = _blocks(header.shape, scale.shape, block)
    if fit is None or scale.dtype not in SCALE_DTYPES or len(header.shape) not in (2, 3):
        raise misfit(
            name,
            header,
            f"with scales {scales} ({scale.dtype}, {list(scale.shape)}), which are neither one for "
            "all, nor one a row, nor one for each block that config.json gives the size of",
        )
    kind, size = fit
    return ScaledLayout(name, header.dtype, header.shape, (scales,), size, scale.dtype, kind)


def _blocks(shape: Shape, scales: Shape, block: object) -> tuple[str, Shape] | None:
    """Kind of FP8 scales of this shape, and sizes of a block on every axis; None for no fit."""
    outer, inner = shape[:-2], shape[-2:]
    if math.prod(scales) == 1 and not outer:
        return "FP8, a scale a tensor", shape
    if math.prod(scales) == math.prod(shape[:-1]) and scales[-1:] in ((1,), shape[-2:-1]):
        return "FP8, a scale a row", (*(1 for _ in shape[:-1]), shape[-1])
    size = _pair(block)
    if size is None or scales != (*outer, *(-(-n // b) for n, b in zip(inner, size, strict=True))):
        return None
    if outer and any(n % b for n, b in zip(inner, size, strict=True)):
        return None  # blocks of experts whose rows lie one after the other would not line up
    return "FP8, a scale a block", (*(1 for _ in outer), *size)


def _pair(block: object) -> tuple[int, int] | None:
    if not isinstance(block, list) or len(block) != 2:
        return None
    rows, columns = block
    whole = type(rows) is int and type(columns) is int and rows > 0 and columns > 0
    return (rows, columns) if whole else None
