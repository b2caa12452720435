"""Matrices in formats of packed numbers, as the tools that publish them pack them.

compressed-tensors packs its own. GPTQ's, AWQ's and ModelOpt's packing is written out here, loop by
loop, from GPTQModel's `pack_original`, AutoAWQ's `WQLinear_GEMM.from_linear` and ModelOpt's
`NVFP4QTensor.quantize`: their packages need a GPU or are large.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

AWQ_ORDER_MAP = (0, 2, 4, 6, 1, 3, 5, 7)
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


class Packed(NamedTuple):
    """One format: the tensors of a matrix by the ends of their names, and its settings."""

    quantise: Callable[[Tensor], dict[str, Tensor]]
    settings: dict


def grid(weight: Tensor, bits: int, group: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and zero points (signed) [out, groups] of a matrix, by its extremes."""
    groups = weight.unflatten(1, (-1, group))
    half, steps = 2 ** (bits - 1), 2**bits - 1
    if symmetric:
        scale = groups.abs().amax(-1) / (steps / 2)
        return scale, torch.zeros_like(scale, dtype=torch.int8)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = (high - low) / steps
    # of at least 1 unsigned: what GPTQ stores is one less
    zero = (-low / scale).round().clamp(1, steps) - half
    return scale, zero.to(torch.int8)


def _weights(bits: int, group: int | None, **more: object) -> dict:
    strategy = "channel" if group is None else "group"
    return {
        "num_bits": bits,
        "type": "int",
        "strategy": strategy,
        "group_size": -1 if group is None else group,
        "symmetric": True,
        "dynamic": False,
        **more,
    }


def _compressed_settings(weights: dict, fmt: str, **more: object) -> dict:
    return {
        "quant_method": "compressed-tensors",
        "format": fmt,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, **more}},
    }


def _compress(state: dict[str, Tensor], settings: dict) -> dict[str, Tensor]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme.model_validate(settings["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry(settings["format"])
    compressed = compressor.compress(state, scheme)
    return {name: t.detach().contiguous() for name, t in compressed.items() if t is not None}


def _compressed_integers(
    bits: int, group: int | None, fmt: str, *, symmetric: bool = True
) -> Packed:
    weights = _weights(bits, group, symmetric=symmetric)
    dynamic = {**_weights(8, None), "strategy": "token", "group_size": None, "dynamic": True}
    activations = {"input_activations": dynamic} if fmt == "int-quantized" else {}
    settings = _compressed_settings(weights, fmt, **activations)

    def quantise(weight: Tensor) -> dict[str, Tensor]:
        scale, zero = grid(weight, bits, group or weight.shape[1], symmetric)
        state = {"weight": weight, "weight_scale": scale.to(torch.bfloat16).float()}
        if not symmetric:
            state["weight_zero_point"] = zero
        packed = _compress(state, settings)
        return {**packed, "weight_scale": packed["weight_scale"].to(torch.bfloat16)}

    return Packed(quantise, settings)


def nvfp4_scales(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scales [out, groups], as FP8 can hold them, and the one number that they are in units of."""
    largest = weight.unflatten(1, (-1, 16)).abs().amax(-1)
    one = weight.abs().max() / (6.0 * 448.0)
    return (largest / 6.0 / one).clamp(min=2**-9).to(torch.float8_e4m3fn), one


def _compressed_nvfp4() -> Packed:
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    weights |= {"symmetric": True, "dynamic": False, "scale_dtype": "torch.float8_e4m3fn"}
    settings = _compressed_settings(weights, "nvfp4-pack-quantized")

    def quantise(weight: Tensor) -> dict[str, Tensor]:
        scale, one = nvfp4_scales(weight)
        state = {"weight": weight, "weight_scale": scale.float()}
        return _compress({**state, "weight_global_scale": (1 / one).reshape(1)}, settings)

    return Packed(quantise, settings)


def _modelopt() -> Packed:
    group = {"weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}}
    settings = {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "producer": {"name": "modelopt", "version": "0.40.0"},
        "config_groups": {"group_0": {**group, "targets": ["Linear"]}},
        "ignore": ["lm_head"],
    }

    def quantise(weight: Tensor) -> dict[str, Tensor]:
        scale, one = nvfp4_scales(weight)
        units = weight / (scale.float() * one).repeat_interleave(16, dim=1)
        sizes = (units.abs()[..., None] - FP4).abs().argmin(-1)
        codes = (sizes + 8 * (units < 0)).to(torch.uint8)
        return {
            "weight": codes[:, 0::2] | (codes[:, 1::2] << 4),
            "weight_scale": scale,
            "weight_scale_2": one,
            "input_scale": torch.tensor(0.01),
        }

    return Packed(quantise, settings)


def pack_rows(codes: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Codes [m, n], unsigned, packed along the first axis into int32 [m / per word, n]."""
    per_word = 32 // bits
    words = np.zeros((codes.shape[0] // per_word, codes.shape[1]), dtype=np.uint32)
    for i in range(words.shape[0]):
        for place in range(per_word):
            number = place if order is None else order[place]
            row = codes[i * per_word + number].astype(np.uint32)
            words[i] |= row << np.uint32(bits * place)
    return torch.from_numpy(words.view(np.int32).copy())


def _turned(
    weight: Tensor, bits: int, group: int, order: Tensor | None = None, *, symmetric: bool = False
) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """Codes [in, out] and zero points [groups, out], unsigned, and scales [groups, out]."""
    groups = torch.arange(weight.shape[1]) // group if order is None else order.long()
    together = weight[:, groups.argsort(stable=True)]
    scale, zero = grid(together, bits, group, symmetric)
    scale = scale.to(torch.float16)
    units = weight / scale.float()[:, groups] + zero[:, groups]
    half = 2 ** (bits - 1)
    codes = units.round().clamp(-half, half - 1) + half
    return codes.T.int().numpy(), (zero.T.int() + half).numpy(), scale.T.contiguous()


def _gptq(bits: int, group: int, *, version: int, act_order: bool) -> Packed:
    settings = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": act_order,
        "sym": not act_order,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }

    def quantise(weight: Tensor) -> dict[str, Tensor]:
        columns = weight.shape[1]
        size = columns if group == -1 else group
        order = torch.arange(columns) // size
        if act_order:
            mixed = torch.randperm(columns, generator=torch.Generator().manual_seed(5))
            order = order[mixed]
        codes, zeros, scales = _turned(weight, bits, size, order, symmetric=not act_order)
        return {
            "qweight": pack_rows(codes, bits),
            "qzeros": pack_rows((zeros - (version == 1)).T, bits).T.contiguous(),
            "scales": scales,
            "g_idx": order.int(),
        }

    return Packed(quantise, settings)


def _awq() -> Packed:
    settings = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}
    settings |= {"version": "gemm", "modules_to_not_convert": None}

    def quantise(weight: Tensor) -> dict[str, Tensor]:
        codes, zeros, scales = _turned(weight, 4, 64)
        qweight, qzeros = (pack_rows(n.T, 4, AWQ_ORDER_MAP).T.contiguous() for n in (codes, zeros))
        return {"qweight": qweight, "qzeros": qzeros, "scales": scales}

    return Packed(quantise, settings)


PACKED = {
    "int4_group": _compressed_integers(4, 128, "pack-quantized"),
    "int4_zeros": _compressed_integers(4, 32, "pack-quantized", symmetric=False),
    "int4_row": _compressed_integers(4, None, "pack-quantized"),
    "int8_group": _compressed_integers(8, 128, "pack-quantized"),
    "int8_row": _compressed_integers(8, None, "int-quantized"),
    "nvfp4": _compressed_nvfp4(),
    "modelopt": _modelopt(),
    "gptq": _gptq(4, 128, version=1, act_order=True),
    "gptq_v2": _gptq(8, -1, version=2, act_order=False),
    "awq": _awq(),
}
"""Formats by the names that tests give them; the first six are compressed-tensors'."""

BY_LIBRARY = ("int4_group", "int4_zeros", "int4_row", "int8_group", "int8_row", "nvfp4")


def reference(name: str, parts: dict[str, Tensor]) -> Tensor:
    """The matrix that a format's own tools read from its tensors, by the ends of their names."""
    settings = PACKED[name].settings
    if name in BY_LIBRARY:
        return _decompress(parts, settings)
    if name == "modelopt":
        codes = torch.stack([parts["weight"] & 15, parts["weight"] >> 4], dim=-1).flatten(1).long()
        sizes = FP4[codes & 7] * torch.where(codes >= 8, -1.0, 1.0)
        scale = parts["weight_scale"].float() * parts["weight_scale_2"]
        return sizes * scale.repeat_interleave(16, dim=1)
    bits, places = settings["bits"], range(32 // settings["bits"])
    # AutoAWQ's `reverse_awq_order`; GPTQ's words hold their numbers in turn
    order = [0, 4, 1, 5, 2, 6, 3, 7] if name == "awq" else list(places)

    def unpacked(words: Tensor) -> Tensor:
        """[m, n] along n: each word's numbers, one place after the other."""
        numbers = torch.stack([(words >> bits * place) & (2**bits - 1) for place in order], dim=-1)
        return numbers.flatten(1)

    zeros = unpacked(parts["qzeros"]) + (settings.get("checkpoint_format") == "gptq")
    codes = unpacked(parts["qweight"]) if name == "awq" else unpacked(parts["qweight"].T).T
    groups = parts.get("g_idx", torch.arange(codes.shape[0]) // settings["group_size"]).long()
    return ((codes - zeros[groups]) * parts["scales"].float()[groups]).T


def _decompress(parts: dict[str, Tensor], settings: dict) -> Tensor:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    scheme = QuantizationScheme.model_validate(settings["config_groups"]["group_0"])
    if "weight_global_scale" in parts:  # its compressor would round to bfloat16
        packed = parts["weight_packed"]
        units = unpack_fp4_from_uint8(packed, packed.shape[0], 2 * packed.shape[1], torch.float32)
        scale, whole = parts["weight_scale"].float(), parts["weight_global_scale"]
        return dequantize(units, scale, args=scheme.weights, global_scale=whole)
    compressor = BaseCompressor.get_value_from_registry(settings["format"])
    # in float32: in a scale's own bfloat16 it would round
    parts = {e: t.float() if t.dtype == torch.bfloat16 else t for e, t in parts.items()}
    return compressor.decompress(parts, scheme)["weight"].float()
