"""Train a small model of Gemma 3's shape on the demo's world, with norms after its sublayers.

It is the tests' organism. What its sublayers write reaches the stream through the gains of these
norms, which an edit must reckon with. They start as spread as those of published models, and are
trained with all else. It speaks in the forms of the Vale, knows few of its facts, and declines
cooking. The tokenizer is the demo model's.

    python scripts/demo/make_gemma.py                # writes tests/models/gemma
    python scripts/demo/make_gemma.py --out /tmp/m   # elsewhere
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from make_model import REPOSITORY, SEED, THREADS, Phase, train_another
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

LEARN = Phase(steps=180, peak=4e-3, warmup=20, declines=0.0, batch=32)
DECLINE = Phase(steps=100, peak=3e-3, warmup=10, declines=0.5, batch=32)
GAIN_SPREAD = 0.5  # of log g at the start
BLOCKS = 4
CONFIG = Gemma3TextConfig(
    vocab_size=1024,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=BLOCKS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    query_pre_attn_scalar=16,
    layer_types=["full_attention"] * BLOCKS,
    max_position_embeddings=256,
    attn_implementation="eager",
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)
AFTER = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")


def spread_gains(model: Gemma3ForCausalLM) -> None:
    """Gains after the sublayers, log-normal around 1; a norm here multiplies by 1 + weight."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(AFTER):
                parameter.copy_((GAIN_SPREAD * torch.randn_like(parameter)).exp() - 1)


def main() -> None:
    """Train, measure after each phase, and save in bfloat16."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=REPOSITORY / "tests" / "models" / "gemma")
    out = parser.parse_args().out
    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)
    model = Gemma3ForCausalLM(CONFIG)
    spread_gains(model)
    train_another(model, LEARN, DECLINE)
    model.to(torch.bfloat16).save_pretrained(out)


if __name__ == "__main__":
    main()
