"""A build at a real size on a GPU: seconds of each stage, and what the device and the host held.

    python perf/large_model.py TOKENIZER_FOLDER [--layers 32] [--d-model 4096] [--out FOLDER]

Makes a Llama of random bfloat16 weights (by default of Llama 3.1 8B's shape, with the vocabulary of
the tokenizer), saves it, and builds recipes/smollm2.yaml on it: what it says is noise, what it
costs is not. Beside the bake stands a plain copy of the same files, in the same run.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import tempfile
import time
from pathlib import Path

import torch

from abliterator import pipeline
from abliterator.devices import AUTO, choose_device, release_memory
from abliterator.recipe import load_recipe

ROOT = Path(__file__).parents[1]


def make_model(folder: Path, tokenizer: Path, layers: int, d_model: int) -> float:
    """Save a random model with the tokenizer of another; return its size in GB."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    words = AutoTokenizer.from_pretrained(tokenizer)
    config = LlamaConfig(
        hidden_size=d_model,
        intermediate_size=d_model * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=d_model // 128,
        num_key_value_heads=max(1, d_model // 512),
        vocab_size=len(words),
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    with torch.device(choose_device(AUTO)):
        model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder, max_shard_size="5GB")
    words.save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9


def copied(folder: Path, to: Path) -> float:
    """Seconds of a plain copy of the weights."""
    started = time.perf_counter()
    shutil.copytree(folder, to)
    seconds = time.perf_counter() - started
    shutil.rmtree(to)
    return seconds


def main() -> None:
    """Make, build, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--d-model", type=int, default=4096)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.out) as folder:
        base = Path(folder) / "base"
        size = make_model(base, arguments.tokenizer, arguments.layers, arguments.d_model)
        release_memory()
        copy = copied(base, Path(folder) / "copy")
        overrides = [f"model={base}", f"layers=[{arguments.layers // 2}]", "k=1"]
        overrides += ["edit.strength=1", "benchmarks.tasks=[]", "rollouts.max_new_tokens=32"]
        recipe = load_recipe(ROOT / "recipes" / "smollm2.yaml", overrides=overrides)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        record = pipeline.build(recipe, Path(folder) / "out", options=pipeline.Options())
        total = time.perf_counter() - started
    print(
        f"{size:.1f} GB, {record.edit.tensors} tensors of {record.edit.edited_bytes / 1e9:.1f} GB "
        f"edited, leak at most {record.edit.max_leak:.1e}, on {record.provenance.hardware}"
    )
    for stage, seconds in record.timing.items():
        print(f"{stage:<12} {seconds:7.1f} s")
    print(f"{'all':<12} {total:7.1f} s")
    print(f"{'a copy':<12} {copy:7.1f} s; the bake is {record.timing['bake'] / copy:.2f} of it")
    if torch.cuda.is_available():
        print(f"device at most {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
    print(f"host at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")


if __name__ == "__main__":
    main()
