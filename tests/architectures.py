"""Tiny random models of every model_type in the anatomy's table that transformers builds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.tiny import randomise

D_MODEL = 32
VOCABULARY = 96

# Asked of every config; it takes what it knows. Names differ, meanings do not.
_WANTED = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "ffn_hidden_size": 48,
    "ffn_dim": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "word_embed_proj_dim": D_MODEL,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 3,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    # latent attention
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    # state spaces and linear attention
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_expand": 2,
    "mamba_d_ssm": 64,
    "mamba_n_groups": 1,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
    "state_size": 8,
    "ssm_state_size": 8,
    "n_groups": 1,
    "mamba_dt_rank": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "rotary_dim": 4,
}

_MIXED = ["linear_attention", "full_attention", "linear_attention"]
_CONV = ["conv", "full_attention", "conv"]
_LATENT = {"num_key_value_heads": 4}
_GEMMA4 = {
    "hidden_size_per_layer_input": 8,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "global_head_dim": 8,
    "num_kv_shared_layers": 0,
}

# What one model_type needs besides, and what switches on its biases and its rarer parts.
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "falcon": {"head_dim": None},
    "gemma4_text": _GEMMA4,
    "glm4_moe_lite": _LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 1], [["global"], 1]], "num_layers": 3},
    "granitemoehybrid": {"layer_types": _MIXED},
    "hyperclovax": {"use_post_norm": True},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 3},
    "lfm2": {"layer_types": _CONV, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": _CONV, "num_dense_layers": 1},
    "llama4_text": {"moe_layers": [1, 2]},
    "mamba2": {"head_dim": 16, "num_heads": 4},
    "minicpm3": _LATENT,
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "num_hidden_layers": 4,
    },
    "qwen3_5_moe_text": {"layer_types": _MIXED},
    "qwen3_5_text": {"layer_types": _MIXED},
    "qwen3_next": {"layer_types": _MIXED, "mlp_only_layers": [0]},
    "starcoder2": {"use_bias": True},
    "youtu": _LATENT,
}

# Models that hold a causal LM beside a vision tower, by the LM's own model_type.
WRAPPED: dict[str, dict[str, Any]] = {
    "gemma3": {"model_type": "gemma3_text"},
    "gemma4": {"model_type": "gemma4_text", **_GEMMA4},
    "llama4": {"model_type": "llama4_text", "moe_layers": [1, 2]},
    "qwen3_5": {"model_type": "qwen3_5_text", "layer_types": _MIXED},
    "qwen3_5_moe": {"model_type": "qwen3_5_moe_text", "layer_types": _MIXED},
}

_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
    "out_hidden_size": D_MODEL,
}

# More than one shape of a type: the rarer parts on.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere-biased": ("cohere", {"attention_bias": True, "use_qk_norm": True}),
    "falcon-sequential": ("falcon", {"head_dim": None, "parallel_attn": False, "bias": True}),
    "falcon-new": ("falcon", {"head_dim": None, "new_decoder_architecture": True}),
    "gemma4_text-moe": ("gemma4_text", {**_GEMMA4, "enable_moe_block": True, "top_k_experts": 2}),
    "glm4-biased": ("glm4", {"attention_bias": True}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt_oss-square": ("gpt_oss", {"intermediate_size": D_MODEL}),
    "hyperclovax-pre_norm": ("hyperclovax", {"use_post_norm": False}),
    "mixtral-square": ("mixtral", {"intermediate_size": D_MODEL}),
    "qwen3_moe-square": ("qwen3_moe", {"moe_intermediate_size": D_MODEL}),
    "stablelm-qk_norm": ("stablelm", {"qk_layernorm": True}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True}),
}


def build(name: str, *, seed: int = 0) -> torch.nn.Module:
    """A random model of a model_type or of a variant, gains and biases random too."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(seed)
    model_type, own = VARIANTS.get(name, (name, _OWN.get(name, {})))
    factory = AutoModelForImageTextToText if model_type in WRAPPED else AutoModelForCausalLM
    model = factory.from_config(_config(model_type, own)).eval()
    randomise(model)
    return model


def save(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Saves `build(name)` without a tokenizer; `options` go to save_pretrained."""
    model = build(name)
    if dtype != torch.float32:
        model.to(dtype)
    model.save_pretrained(folder, **options)
    return folder


def _config(model_type: str, own: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    if model_type in WRAPPED:
        text = {**WRAPPED[model_type], **own}
        return AutoConfig.for_model(
            model_type,
            text_config=_config(text.pop("model_type"), text).to_dict(),
            vision_config=_VISION,
        )
    blank = AutoConfig.for_model(model_type)
    known = {*blank.to_dict(), *type(blank).attribute_map}
    wanted = {key: value for key, value in _WANTED.items() if key in known} | own
    return AutoConfig.for_model(
        model_type, **{key: value for key, value in wanted.items() if value is not None}
    )
