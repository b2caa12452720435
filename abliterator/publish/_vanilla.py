"""Loads a folder the way a stranger would; run by a fresh interpreter, without abliterator.

usage: python _vanilla.py FOLDER [--remote-code]     # prints one JSON object
"""

from __future__ import annotations

import json
import sys


def main(folder: str, remote_code: bool) -> dict[str, object]:
    """Config, weights, tokenizer, chat template, and one step of the model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto",
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=remote_code,
        output_loading_info=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=remote_code
    )
    asked = [{"role": "user", "content": "Which planet is the largest?"}]
    text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
    return {
        "missing": sorted(report["missing_keys"]),
        "mismatched": sorted(str(key) for key in report["mismatched_keys"]),
        "finite": bool(torch.isfinite(logits[0, -1]).all()),
    }


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(main(sys.argv[1], "--remote-code" in sys.argv)) + "\n")
