"""Tiny random models of every family in the anatomy's table, saved as a user's checkpoint would be.

Gains of norms and biases are random: transformers' initial 1 and 0 would hide an edit that forgets
them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>", "<pad>"]

N_LAYERS = 3
D_MODEL = 32
VOCABULARY = 384

# o_proj is square where head_dim is None (4 heads of 8), so a wrong side is not caught by its
# shape.
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 3,
}

CONFIGS = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "llama_biased": lambda: LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True),
    "llama_tied": lambda: LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**_SIZES, head_dim=8, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**_SIZES),
    "qwen3": lambda: Qwen3Config(**_SIZES, head_dim=16),
    "qwen3_biased": lambda: Qwen3Config(**_SIZES, head_dim=8, attention_bias=True),
    "gemma": lambda: GemmaConfig(**_SIZES, head_dim=16),
    "phi3": lambda: Phi3Config(**_SIZES),
    "smollm3": lambda: SmolLM3Config(**_SIZES),
}

# Every buildable family: "qwen" is remote code (see models/remote_qwen/).
FAMILIES = (*CONFIGS, "qwen")


def model_type(family: str) -> str:
    """The model_type that a family of `FAMILIES` is saved with."""
    return family.split("_")[0]


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that adds a BOS when asked for special tokens, as Llama's does."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "which river runs through the old town, and what do the people there eat in winter? "
    raw.train_from_iterator([text * 3, text.title() * 2, "system user assistant"], trainer)
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_tiny(
    family: str,
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "1GB",
    seed: int = 0,
) -> Path:
    """Saves a random model of `family` with `tokenizer`; a small `shard_size` makes shards."""
    torch.manual_seed(seed)
    model = _random_qwen() if family == "qwen" else _random(family)
    randomise(model)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    tokenizer.save_pretrained(folder)
    if family == "qwen":
        _add_remote_code(folder)
    return folder


def randomise(model: torch.nn.Module) -> None:
    """Random matrices that keep activations near 1, and random gains and biases."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.normal_(0, parameter.shape[1] ** -0.5)


def _random(family: str) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(CONFIGS[family]())


def _random_qwen() -> torch.nn.Module:
    from tests.models.remote_qwen.modeling_qwen import QWenConfig, QWenLMHeadModel

    own = {"seq_length": 256, "kv_channels": 8, "rotary_pct": 1.0, "rotary_emb_base": 500.0}
    return QWenLMHeadModel(QWenConfig(**_SIZES, **own, no_bias=True, layer_norm_epsilon=1e-6))


def _add_remote_code(folder: Path) -> None:
    """Makes the folder run our code in place of Qwen 1's."""
    shutil.copy(Path(__file__).parents[1] / "models" / "remote_qwen" / "modeling_qwen.py", folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "modeling_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    }
    (folder / "config.json").write_text(json.dumps(config))
