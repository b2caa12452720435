"""Turn a Qwen 1 checkpoint (Qwen-1.8B-Chat, 7B, 14B, 72B) into a Qwen 2 folder that does the same.

Qwen 1 runs Python from its repository, which transformers 5 can no longer run. Its architecture is
that of Qwen 2 with q, k and v in one tensor: the weights are renamed and c_attn is cut in three,
so that every number stays what it was, and no code of the repository is run.

    hf download Qwen/Qwen-1_8B-Chat --local-dir qwen-1.8b-chat-original
    python scripts/qwen1/make_model.py qwen-1.8b-chat-original qwen-1.8b-chat

Beyond the trained length (`seq_length`) Qwen 1 stretches its positions, and Qwen 2 does not.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

# Qwen 1 is older than chat templates: this is what its own `make_context` writes.
TEMPLATE = """\
{%- if messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END_OF_TEXT, TURN_START, TURN_END, *(f"<|extra_{i}|>" for i in range(205)))

RENAMED = {
    "transformer.wte.": "model.embed_tokens.",
    "transformer.h.": "model.layers.",
    "transformer.ln_f.": "model.norm.",
    ".attn.c_proj.": ".self_attn.o_proj.",
    ".mlp.c_proj.": ".mlp.down_proj.",
    ".mlp.w2.": ".mlp.gate_proj.",  # the one that goes through SiLU
    ".mlp.w1.": ".mlp.up_proj.",
    ".ln_1.": ".input_layernorm.",
    ".ln_2.": ".post_attention_layernorm.",
}


def convert_config(old: dict[str, Any]) -> dict[str, Any]:
    """The same sizes as a Qwen 2 config; what Qwen 2 could not say is refused."""
    if old.get("model_type") != "qwen":
        raise click.ClickException(f"model_type is {old.get('model_type')!r}, expected 'qwen'.")
    width = old["num_attention_heads"] * old["kv_channels"]
    if not old["no_bias"] or old["rotary_pct"] != 1.0 or width != old["hidden_size"]:
        raise click.ClickException("This Qwen 1 has biases or positions that Qwen 2 has not.")
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "bos_token_id": None,
        "dtype": "bfloat16",
        "eos_token_id": None,  # see generation_config.json
        "hidden_act": "silu",
        "hidden_size": old["hidden_size"],
        "intermediate_size": old["intermediate_size"] // 2,  # Qwen 1 counts gate and up together
        "max_position_embeddings": old["seq_length"],
        "num_attention_heads": old["num_attention_heads"],
        "num_hidden_layers": old["num_hidden_layers"],
        "num_key_value_heads": old["num_attention_heads"],
        "rms_norm_eps": old["layer_norm_epsilon"],
        "rope_theta": float(old["rotary_emb_base"]),
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": old["vocab_size"],
    }


def convert_tensor(name: str, tensor: Any) -> Iterator[tuple[str, Any]]:
    """The tensor under its Qwen 2 names: c_attn is q, k and v on top of each other."""
    for before, after in RENAMED.items():
        name = name.replace(before, after)
    if ".attn.c_attn." in name:
        for part, rows in zip("qkv", tensor.chunk(3), strict=True):
            yield name.replace(".attn.c_attn.", f".self_attn.{part}_proj."), rows.contiguous()
    elif not name.endswith(("inv_freq", "masked_bias", "logn_tensor")):
        yield name, tensor


def convert_weights(folder: Path, out: Path) -> None:
    """Converts shard by shard, and writes an index where there are several."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise click.ClickException(f"there is no .safetensors file in {folder}.")
    places, total = {}, 0
    for shard in shards:
        with safe_open(shard, "pt") as old:
            new = {
                name: tensor
                for key in old.keys()  # noqa: SIM118, this is no dict
                for name, tensor in convert_tensor(key, old.get_tensor(key))
            }
        save_file(new, out / shard.name, {"format": "pt"})
        places |= dict.fromkeys(new, shard.name)
        total += sum(tensor.nbytes for tensor in new.values())
    if len(shards) == 1:
        (out / shards[0].name).rename(out / "model.safetensors")
    else:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        write_json(out / "model.safetensors.index.json", index)


def convert_tokenizer(vocabulary: Path, *, chat: bool) -> Any:
    """The byte-level BPE of qwen.tiktoken (lines of base64 and rank) as a fast tokenizer."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers import pre_tokenizers as pre
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            lines = (line.split() for line in Path(tiktoken_url).read_bytes().splitlines() if line)
            return {base64.b64decode(token): int(rank) for token, rank in lines}

    vocab, merges = Converter(str(vocabulary)).extract_vocab_merges_from_model(str(vocabulary))
    raw = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    raw.normalizer = normalizers.NFC()
    split = pre.Split(Regex(WORDS), behavior="isolated")
    raw.pre_tokenizer = pre.Sequence(
        [split, pre.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token=TURN_END if chat else END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE if chat else None
    return tokenizer


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def convert(folder: Path, out: Path) -> None:
    """Converts the checkpoint in `folder` to a new folder `out`."""
    config = convert_config(json.loads((folder / "config.json").read_text("utf-8")))
    generation = json.loads((folder / "generation_config.json").read_text("utf-8"))
    chat = generation.get("chat_format") == "chatml"
    out.mkdir(parents=True)
    convert_weights(folder, out)
    tokenizer = convert_tokenizer(folder / "qwen.tiktoken", chat=chat)
    tokenizer.save_pretrained(out)
    stops = [END_OF_TEXT, TURN_START, TURN_END] if chat else [END_OF_TEXT]
    ends = tokenizer.convert_tokens_to_ids(stops)
    write_json(out / "generation_config.json", {"do_sample": False, "eos_token_id": ends})
    for name in ("LICENSE", "NOTICE"):
        if (folder / name).is_file():
            shutil.copy(folder / name, out / name)
    write_json(out / "config.json", config)


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("out", type=click.Path(path_type=Path))
def main(folder: Path, out: Path) -> None:
    """The command line: its help is the text at the top of this file."""
    if out.exists():
        raise click.ClickException(f"{out} exists already. Give a new folder.")
    convert(folder, out)


if __name__ == "__main__":
    main()
