"""Sizes of tiny models, by model_type: what every config gets, and what some need besides."""

from __future__ import annotations

from typing import Any

from tests.helpers.stream_sizes import INDEXED, SEVERAL_STREAMS

D_MODEL = 32
VOCABULARY = 96

# Asked of every config; it takes what it knows. Names differ, meanings do not.
WANTED = {
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

_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
_MIXED = ["linear_attention", "full_attention", "linear_attention"]
_CONV = ["conv", "full_attention", "conv"]
_LATENT = {"num_key_value_heads": 4}
_GEMMA4 = {
    "hidden_size_per_layer_input": 8,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "global_head_dim": 8,
    "num_kv_shared_layers": 0,
}

_VQ = {
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "embed_dim": 8,
    "latent_channels": 8,
    "num_embeddings": 8,
    "num_res_blocks": 1,
    "resolution": 16,
}

# What one model_type needs besides, and what switches on its biases and its rarer parts.
OWN: dict[str, dict[str, Any]] = {
    **SEVERAL_STREAMS,
    "axk1": _LATENT,
    "axk2": INDEXED,
    "bailing_hybrid": {"layer_group_size": 3, **_LATENT},
    "bamba": {"attn_layer_indices": [1]},
    "beam": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "chameleon": {"vocabulary_map": {"<image>": 90, "IMGIMGAZ": 91}, "vq_config": _VQ},
    "ctrl": {"dff": 48, "n_positions": 64},
    "dbrx": {
        "d_model": D_MODEL,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {
            "ffn_hidden_size": 24,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "hidden_size": 32,
        },
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": _MROPE}},
    "deepseek_v2": _LATENT,
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "dots3_note_text": {
        **INDEXED,
        "head_dim": 16,
        **{f"swa_{name}": 4 for name in ("num_attention_heads", "num_key_value_heads")},
        **{f"swa_{name}": 8 for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim")},
        "swa_head_dim": 16,
        "swa_v_head_dim": 8,
        "layer_types": ["sliding_attention", "indexed_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "deepseek_v32": INDEXED,
    "deepseek_v3": _LATENT,
    "falcon": {"head_dim": None},
    "gemma4_text": _GEMMA4,
    "gemma3n_text": {
        "hidden_size_per_layer_input": 8,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
        "altup_num_inputs": 3,
    },
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": INDEXED,
    "gemma4_unified_text": {**_GEMMA4, "num_kv_shared_layers": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1], [["global"], 1]], "num_layers": 3},
    "granitemoehybrid": {"layer_types": _MIXED},
    "hyperclovax": {"use_post_norm": True},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 3},
    "kimi_linear": {
        **_LATENT,
        "linear_attn_config": {
            "num_heads": 4,
            "head_dim": 8,
            "short_conv_kernel_size": 4,
            "kda_layers": [1, 3],
            "full_attn_layers": [2],
        },
    },
    "lara_mini": {"layer_types": ["linear_attention", "sliding_attention", "full_attention"]},
    "lfm3": {"layer_types": _CONV},
    "lfm2": {"layer_types": _CONV, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": _CONV, "num_dense_layers": 1},
    "llama4_text": {"moe_layers": [1, 2]},
    "longcat_flash": {
        **_LATENT,
        "num_layers": 3,
        "num_hidden_layers": None,
        "moe_topk": 2,
        "num_experts_per_tok": None,
        "zero_expert_num": 2,
        "expert_ffn_hidden_size": 24,
    },
    "mistral_large4_text": INDEXED,
    "mistral4": {**_LATENT, "head_dim": 16},
    "olmo_hybrid": {"layer_types": _MIXED},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": D_MODEL},
    "step3p5": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "share_expert_dim": 24,
        "sliding_window": 4,
    },
    "xglm": {"d_model": D_MODEL, "num_layers": 3, "attention_heads": 4},
    "xlstm": {"num_heads": 4},
    "zamba": {
        "attention_head_dim": 16,
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
        "mamba_proj_bias": True,
    },
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "hybrid"]},
    "mamba2": {"head_dim": 16, "num_heads": 4},
    "minicpm3": _LATENT,
    "minimax": {"block_size": 4},
    "molmo2_text": {"additional_vocab_size": 4},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "num_hidden_layers": 4,
    },
    "qwen3_5_moe_text": {"layer_types": _MIXED},
    "qwen3_5_text": {"layer_types": _MIXED},
    "qwen3_next": {"layer_types": _MIXED, "mlp_only_layers": [0]},
    "sarvam_mla": _LATENT,
    "phi4_multimodal": {
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "crop_size": 28,
        },
        "audio_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 16,
            "depthwise_separable_out_channel": 16,
            "nemo_conv_channels": 16,
        },
    },
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [24, 16],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "moe_num_shared_experts": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "starcoder2": {"use_bias": True},
    "youtu": _LATENT,
    "zaya": {"router_hidden_size": 16, "num_experts_per_tok": 1},
}

# Models that hold a causal LM beside a vision tower, whose tiny language model needs more than the
# LM's own model_type does.
_WITH_MROPE = [
    *("glm46v", "glm4v", "glm_ocr", "glmga", "hunyuan_vl", "paddleocr_vl", "qwen2_5_omni_thinker"),
    *("qwen2_5_vl", "qwen2_vl", "qwen3_omni_moe_thinker", "qwen3_vl", "qwen3_vl_moe"),
]
WRAPPED: dict[str, dict[str, Any]] = {
    "gemma4": _GEMMA4,
    "gemma4_unified": _GEMMA4,
    "llama4": {"moe_layers": [1, 2]},
    "mllama": {"cross_attention_layers": [1]},
    **{name: {"rope_parameters": _MROPE} for name in _WITH_MROPE},
    "glm4v_moe": {"rope_parameters": {**_MROPE, "mrope_section": [1, 1, 0]}},
}

# Wrappers whose vision tower has other names as published: when transformers turns names back, it
# gives them to the language model's blocks too, which nobody publishes so.
SAVED_AS_LOADED = {"kimi_k25": ".model.blocks.0.", "qianfan_ocr": ".model.encoder.layers.0."}

VISION = {
    "hidden_size": 16,
    "embed_dim": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
    "out_hidden_size": D_MODEL,
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "output_dim": D_MODEL,
    "vision_output_dim": D_MODEL,
    # tokenizers of images and sound
    "codebook_size": 8,
    "codebook_dim": 16,
    "num_filters": 2,
    "base_channels": 32,
    "latent_channels": 8,
    "num_res_blocks": 1,
}

_SAM = {
    **VISION,
    "output_channels": 16,
    "image_size": 64,
    "mlp_dim": 16,
    "global_attn_indexes": [0],
}

# What a wrapper's own config must say for its parts to fit together.
AROUND: dict[str, dict[str, Any]] = {
    "apertus1p5": {"image_token_offset": 60, "audio_token_offset": 68},
    "cohere_compass": {"vision_config": {**VISION, "deepstack_visual_indexes": [0]}},
    "unlimited_ocr": {
        "vision_config": {
            "sam_config": {**_SAM, "downsample_channels": [16, 16]},
            "encoder_config": VISION,
        },
    },
    "deepseek_ocr2": {
        "vision_config": {
            "sam_config": {**_SAM, "downsample_channels": [16, 16]},
            "encoder_config": {**VISION, "num_key_value_heads": 2, "vocab_size": 8},
        },
    },
    "dots3_note": {
        "audio_config": {
            **VISION,
            "adapter_input_size": 16,
            "adapter_output_size": D_MODEL,
            "downsample_hidden_size": 16,
        },
        "vision_config": {
            "embed_dim": 16,
            "num_heads": 2,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "mlp_layer_types": ["dense"],
            "adapter_in_dim": 16,
            "adapter_out_dim": D_MODEL,
        },
    },
    "emu3": {"vocabulary_map": {"<image>": 90, "<|extra_200|>": 91, "<|visual token 000000|>": 92}},
    "granite4_vision": {
        "vision_config": {**VISION, "model_type": "siglip_vision_model", "hidden_size": 64},
        "deepstack_layer_map": [[-1, 1]],
        "spatial_target_layers": [0, 1, 2, 0],
        "downsample_rate": "1/2",
    },
    "muse_glimmer": {"projector_hidden_size": 16},
    "nemotron_h_omni": {
        "vision_config": {**VISION, "video_temporal_patch_size": 2},
        "projector_hidden_size": 16,
    },
    "molmo2": {
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "image_size": [28, 28],
        },
        "adapter_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "text_hidden_size": D_MODEL,
            "vision_feature_layer": [0],
        },
    },
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
