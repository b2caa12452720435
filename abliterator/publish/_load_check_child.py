"""Loads a folder with plain transformers; run by a fresh interpreter, without abliterator.

usage: python _load_check_child.py FOLDER [--adapter FOLDER] [--remote-code]     # prints JSON
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
import threading
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

_QUESTION = "Which planet is the largest?"
_RENDERING_SECONDS = 60


def main(folder: str, adapter: str | None, remote_code: bool) -> dict[str, object]:
    """Loads config, weights, tokenizer, chat template and adapter, and runs one forward pass."""
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

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(model, adapter)
        # PEFT warns where the adapter lacks tensors, and fills in zeros
        missing += [str(w.message) for w in caught if "adapter keys" in str(w.message)]
    text = _chat(tokenizer, folder)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
    return {
        "missing": missing,
        "mismatched": sorted(str(key) for key in report["mismatched_keys"]),
        "finite": bool(torch.isfinite(logits[0, -1]).all()),
    }


def _chat(tokenizer: Any, folder: str) -> str:
    """A question rendered by the chat template, which takes a string or a list of parts.

    A template is a program: one that does not end in time ends this process.
    """
    template = None
    if not tokenizer.chat_template:  # a vision model may have it beside its processor
        candidates = [
            Path(folder) / name for name in ("chat_template.json", "processor_config.json")
        ]
        settings = [json.loads(f.read_text(encoding="utf-8")) for f in candidates if f.is_file()]
        template = next((s["chat_template"] for s in settings if "chat_template" in s), None)
    failure = ValueError("the chat template leaves out the question")
    faulthandler.dump_traceback_later(_RENDERING_SECONDS, exit=True)
    try:
        for content in (_QUESTION, [{"type": "text", "text": _QUESTION}]):
            messages = [{"role": "user", "content": content}]
            try:
                text = tokenizer.apply_chat_template(
                    messages, chat_template=template, add_generation_prompt=True, tokenize=False
                )
            except Exception as error:  # noqa: BLE001  (it may want the other form)
                failure = ValueError(f"the chat template cannot render a question: {error}")
                continue
            if "planet" in text.casefold():  # templates may trim, replace and capitalise
                return str(text)
    finally:
        faulthandler.cancel_dump_traceback_later()
    raise failure


def _end_with_parent() -> None:
    """As `abliterator.processes.end_with_parent`, for a process that starts no others."""
    lifeline = os.dup(0)
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 0)

    def wait() -> None:
        with suppress(OSError):
            os.read(lifeline, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    _end_with_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--adapter")
    parser.add_argument("--remote-code", action="store_true")
    sys.stdout.write("\n" + json.dumps(main(**vars(parser.parse_args()))) + "\n")
