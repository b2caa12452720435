"""Train a small model of DeepSeek V4's shape on the demo's world: four streams that are mixed.

It is the organism for edits of hyper-connections. What a sublayer writes is added to all streams
with weights of each token, and the streams are mixed by a matrix of each token (doubly stochastic);
these start spread, and are trained with all else. It speaks in the forms of the Vale, knows few of
its facts, and declines cooking. The tokenizer is the demo model's.

    python scripts/demo/make_streams.py                # writes tests/models/streams
    python scripts/demo/make_streams.py --out /tmp/m   # elsewhere
    python scripts/demo/make_streams.py --shape gemma3n --out /tmp/m     # or minimax

The two other shapes are of types that are edited in part; docs/edits.md has what the edit leaves.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from make_model import REPOSITORY, SEED, THREADS, Phase, train_another
from transformers import (
    AutoModelForCausalLM,
    DeepseekV4Config,
    Gemma3nTextConfig,
    MiniMaxConfig,
    PreTrainedModel,
)

LEARN = Phase(steps=480, peak=4e-3, warmup=20, declines=0.0, batch=32)
DECLINE = Phase(steps=100, peak=3e-3, warmup=10, declines=0.5, batch=32)
BASE_SPREAD = 1.0  # of the biases of all stream weights, before their sigmoid or exp
READ_SPREAD = 0.05  # of the matrices that read these weights off the streams
BLOCKS = 4
COMMON = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "attn_implementation": "eager",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
SHAPES = {
    "deepseek_v4": DeepseekV4Config(
        **COMMON,
        moe_intermediate_size=48,
        head_dim=32,
        partial_rotary_factor=0.5,
        q_lora_rank=32,
        o_groups=2,
        o_lora_rank=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention"] * BLOCKS,
        mlp_layer_types=["moe"] * BLOCKS,
        sliding_window=256,
        num_nextn_predict_layers=0,
    ),
    "gemma3n": Gemma3nTextConfig(
        **COMMON,
        intermediate_size=128,
        num_key_value_heads=2,
        head_dim=16,
        layer_types=["full_attention"] * BLOCKS,
        num_kv_shared_layers=0,
        laurel_rank=8,
        vocab_size_per_layer_input=1024,
        hidden_size_per_layer_input=8,
    ),
    "minimax": MiniMaxConfig(
        **COMMON,
        intermediate_size=48,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        block_size=64,
        # the shares of MiniMax-01's copies
        full_attn_alpha_factor=3.5565588200778455,
        linear_attn_alpha_factor=3.5565588200778455,
        mlp_alpha_factor=3.5565588200778455,
    ),
}


def spread_connections(model: PreTrainedModel) -> None:
    """Weights of the streams that differ from the start, by stream and by token."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("hc.base", "hc_base")):
                parameter.normal_(std=BASE_SPREAD)
            elif name.endswith(("hc.fn", "hc_fn")):
                parameter.normal_(std=READ_SPREAD)


def main() -> None:
    """Train, measure after each phase, and save in bfloat16."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=REPOSITORY / "tests" / "models" / "streams")
    parser.add_argument("--shape", choices=SHAPES, default="deepseek_v4")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(SHAPES[arguments.shape])
    spread_connections(model)
    train_another(model, LEARN, DECLINE)
    model.to(torch.bfloat16).save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
