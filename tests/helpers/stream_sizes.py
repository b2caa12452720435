"""Sizes of tiny models whose blocks hold several residual streams, by model_type."""

from __future__ import annotations

from typing import Any

INDEXED = {"num_key_value_heads": 4, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4}

SEVERAL_STREAMS: dict[str, dict[str, Any]] = {
    "deepseek_v4": {
        "intermediate_size": 64,
        "num_key_value_heads": 1,
        "partial_rotary_factor": 0.5,
        "layer_types": [
            *("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"),
        ],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "o_groups": 2,
        "o_lora_rank": 8,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_topk": 2,
        "hc_mult": 3,
    },
    "glm5_next_text": {
        **INDEXED,
        "index_kpool": 2,
        "qk_rope_head_dim": 0,
        "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "hc_mult": 3,
    },
    "hy_v4": {**INDEXED, "hc_mult": 3},
    "hy_v4_vl_text": {
        **INDEXED,
        "hc_mult": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    },
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
        "hc_count": 3,
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [3],
        "ple_embed_dim": 16,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 20,
        "make_ngram_vocab_size_divisible_by": 4,
        "split_ngram_parts": 2,
    },
}
