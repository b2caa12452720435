"""Loads a folder the way a stranger would; run by a fresh interpreter, without abliterator.

usage: python _vanilla.py FOLDER [--adapter FOLDER] [--remote-code]     # prints one JSON object
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings


def main(folder: str, adapter: str | None, remote_code: bool) -> dict[str, object]:
    """Config, weights, tokenizer, chat template, the adapter if any, and one step of the model."""
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
    missing = sorted(report["missing_keys"])
    if adapter is not None:
        from peft import PeftModel

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(model, adapter)
        # PEFT warns where the adapter lacks tensors, and fills in zeros
        missing += [str(w.message) for w in said if "adapter keys" in str(w.message)]
    asked = [{"role": "user", "content": "Which planet is the largest?"}]
    text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
    return {
        "missing": missing,
        "mismatched": sorted(str(key) for key in report["mismatched_keys"]),
        "finite": bool(torch.isfinite(logits[0, -1]).all()),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--adapter")
    parser.add_argument("--remote-code", action="store_true")
    sys.stdout.write("\n" + json.dumps(main(**vars(parser.parse_args()))) + "\n")
