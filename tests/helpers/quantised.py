"""Tiny random checkpoints in every quantised format, as those who publish them store them.

Each is made from the same matrices, so what plain numbers lose can be told apart from the edit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, Qwen3MoeConfig

from abliterator.formats import mxfp4_blocks, mxfp4_rounded, mxfp4_scales
from tests.helpers.packed import PACKED
from tests.helpers.tiny import randomise

D_MODEL, BLOCK = 256, 128
LARGEST = 448.0


class Format(NamedTuple):
    """One quantised format: its weights and scales from a matrix, and what config.json says."""

    suffix: str
    quantise: Callable[[Tensor], tuple[Tensor, Tensor]]
    settings: dict


def in_blocks(weight: Tensor, step: tuple[int, int]) -> Tensor:
    """Largest size in each block: [rows / step, columns / step]."""
    rows, columns = (-(-n // s) for n, s in zip(weight.shape, step, strict=True))
    found = torch.zeros(rows, columns)
    for i in range(rows):
        for j in range(columns):
            part = weight[i * step[0] : (i + 1) * step[0], j * step[1] : (j + 1) * step[1]]
            found[i, j] = part.abs().max()
    return found


def expanded(scale: Tensor, shape: tuple[int, ...], step: tuple[int, int]) -> Tensor:
    rows, columns = (torch.arange(n) // s for n, s in zip(shape, step, strict=True))
    return scale[rows[:, None], columns[None, :]]


def _blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = in_blocks(weight, (BLOCK, BLOCK)) / LARGEST
    units = expanded(scale, weight.shape, (BLOCK, BLOCK))
    return (weight / units).to(torch.float8_e4m3fn), scale


def _ue8m0(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = torch.exp2(torch.ceil(torch.log2(in_blocks(weight, (BLOCK, BLOCK)) / LARGEST)))
    units = expanded(scale, weight.shape, (BLOCK, BLOCK))
    return (weight / units).to(torch.float8_e4m3fn), scale.to(torch.float8_e8m0fnu)


def _rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = (weight.abs().amax(dim=1, keepdim=True) / LARGEST).to(torch.bfloat16)
    numbers = (weight / scale.float()).clamp(-LARGEST, LARGEST)
    return numbers.to(torch.float8_e4m3fn), scale


def _whole(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = (weight.abs().max() / LARGEST).reshape(1)
    return (weight / scale).to(torch.float8_e4m3fn), scale


def _compressed(strategy: str) -> dict:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": {**weights, "dynamic": False}}
        },
    }


_FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}

FORMATS = {
    "fp8_block": Format("_scale_inv", _blocks, _FP8),
    "fp8_ue8m0": Format("_scale_inv", _ue8m0, {**_FP8, "scale_fmt": "ue8m0"}),
    "compressed_row": Format("_scale", _rows, _compressed("channel")),
    "compressed_tensor": Format("_scale", _whole, _compressed("tensor")),
}


def save_quantised(
    name: str,
    folder: Path,
    *,
    shard_size: str = "1GB",
    d_model: int = D_MODEL,
    n_layers: int = 2,
    vocabulary: int = 64,
) -> Path:
    """Saves a tiny random model in a format.

    Args:
        name: of `FORMATS` or `PACKED`, for a Llama with its linear weights in it; the same and
            " experts", for a Qwen 3 with experts; or "mxfp4", for a gpt-oss with its experts in it.
        folder: where to.
        shard_size: as transformers takes it.
        d_model: width of the stream.
        n_layers: blocks.
        vocabulary: rows of the embedding.
    """
    if name == "mxfp4":
        return save_mxfp4(folder, shard_size, d_model, n_layers, vocabulary)
    name, _, experts = name.partition(" ")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": d_model,
        "intermediate_size": 384,
        "head_dim": 64,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    more = {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": BLOCK}
    config = (
        Qwen3MoeConfig(**sizes, **more, tie_word_embeddings=False)
        if experts
        else LlamaConfig(**sizes)
    )
    _save(config, folder, shard_size)
    if name in PACKED:
        return pack_linear(folder, name)
    fmt = FORMATS[name]

    def quantise(tensor: str, weight: Tensor) -> dict[str, Tensor]:
        if not tensor.endswith("_proj.weight"):
            return {tensor: weight}
        numbers, scale = fmt.quantise(weight.float())
        return {tensor: numbers, tensor + fmt.suffix: scale}

    return rewrite(folder, quantise, fmt.settings)


def pack_linear(folder: Path, name: str) -> Path:
    """Stores the linear weights of a checkpoint's blocks in a format of `PACKED`."""

    def quantise(tensor: str, weight: Tensor) -> dict[str, Tensor]:
        if not tensor.endswith("_proj.weight"):
            return {tensor: weight}
        module = tensor.removesuffix("weight")
        return {module + e: part for e, part in PACKED[name].quantise(weight.float()).items()}

    return rewrite(folder, quantise, PACKED[name].settings)


def save_mxfp4(
    folder: Path, shard_size: str, d_model: int, n_layers: int, vocabulary: int = 64
) -> Path:
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=vocabulary,
        hidden_size=d_model,
        intermediate_size=D_MODEL,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_local_experts=4,
        num_experts_per_tok=4,
        layer_types=["sliding_attention", "full_attention"][:n_layers],
    )
    _save(config, folder, shard_size)

    def quantise(tensor: str, weight: Tensor) -> dict[str, Tensor]:
        if not tensor.endswith(("experts.down_proj", "experts.gate_up_proj")):
            return {tensor: weight}
        blocks, exponents = mxfp4(weight.float())
        return {tensor + "_blocks": blocks, tensor + "_scales": exponents}

    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"]
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": [*skipped, "lm_head"]}
    return rewrite(folder, quantise, settings)


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[expert, in, out] as blocks and exponents of [expert, out, in]."""
    blocks, exponents = [], []
    for expert in weight.transpose(1, 2):
        largest = expert.unflatten(1, (-1, 32)).abs().amax(-1)
        exponent = (torch.floor(torch.log2(largest)) - 2 + 127).to(torch.uint8)
        numbers = mxfp4_rounded(expert / mxfp4_scales(exponent))
        blocks.append(mxfp4_blocks(numbers))
        exponents.append(exponent)
    return torch.stack(blocks), torch.stack(exponents)


def _save(config: object, folder: Path, shard_size: str) -> None:
    model = AutoModelForCausalLM.from_config(config)
    randomise(model)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard_size)


def rewrite(
    folder: Path, quantise: Callable[[str, Tensor], dict[str, Tensor]], settings: dict
) -> Path:
    """Puts what `quantise` makes of each tensor in its place, and `settings` into config.json."""
    where = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors: dict[str, Tensor] = {}
        for name, tensor in load_file(path).items():
            tensors |= quantise(name, tensor)
        save_file(tensors, path, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, path.name)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        told = {"metadata": {"total_size": 1}, "weight_map": where}
        index.write_text(json.dumps(told))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return folder
