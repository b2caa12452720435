"""A tiny random model whose columns divide into groups, and the same as a GGUF file."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.helpers.tiny import randomise

HEADS, KV_HEADS, LAYERS = 4, 2, 2
CONFIG = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 64,
}
# llama.cpp's names, and how many heads' halves its converter interleaves
_NAMES = {
    "self_attn.q_proj": ("attn_q", HEADS),
    "self_attn.k_proj": ("attn_k", KV_HEADS),
    "self_attn.v_proj": ("attn_v", None),
    "self_attn.o_proj": ("attn_output", None),
    "mlp.gate_proj": ("ffn_gate", None),
    "mlp.up_proj": ("ffn_up", None),
    "mlp.down_proj": ("ffn_down", None),
    "input_layernorm": ("attn_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
}
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def save_model(folder: Path, *, shard_size: str = "1GB") -> Path:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**CONFIG))
    randomise(model)
    model.bfloat16().save_pretrained(folder, max_shard_size=shard_size)
    return folder


def weights_of(folder: Path) -> dict:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def write_gguf(folder: Path, path: Path, *, swapped: str = "") -> Path:
    """The model in `folder` as Q8_0, or with the rows of the tensor `swapped` in another order."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(CONFIG["hidden_size"])
    writer.add_feed_forward_length(CONFIG["intermediate_size"])
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_name("tiny")
    for name, tensor in weights_of(folder).items():
        rows = tensor.float().numpy()
        stored, heads = _gguf_name(name)
        if heads is not None:
            rows = rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
        if stored == swapped:
            rows = np.ascontiguousarray(rows[::-1])
        if rows.ndim == 1:
            writer.add_tensor(stored, rows)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(stored, gguf.quants.quantize(rows, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_name(name: str) -> tuple[str, int | None]:
    module = name.removesuffix(".weight")
    if module in _WHOLE:
        return f"{_WHOLE[module]}.weight", None
    block, _, rest = module.removeprefix("model.layers.").partition(".")
    stored, heads = _NAMES[rest]
    return f"blk.{block}.{stored}.weight", heads
