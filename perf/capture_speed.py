"""Tokens a second of a capture against a bare forward pass over as many tokens, in one run.

    python perf/capture_speed.py MODEL_FOLDER [--prompts recipes/smollm2/declined.jsonl] [--runs 5]

The bare pass runs the model's blocks over random tokens, in full batches of the prompts' mean
length, and keeps nothing. Beside it: the capture as it is (`exact`, batches of equal length), with
what all prompts begin with run once (`capture.share_prefix`), and left-padded as most tools do it.
Each is the best of several runs, in turn, by processor time on a CPU; the ratio is bare / capture,
so more than 1 is faster than running all tokens. The last column is how far directions (the mean
over one half of the prompts less that over the other) are from those of `exact`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from abliterator.capture import capture
from abliterator.engines import TransformersEngine
from abliterator.model import load_model, render_chat, shared_tokens
from abliterator.subspace import MomentSet

ROOT = Path(__file__).parents[1]
MAX_TOKENS = 4096


def now(device: str) -> float:
    """Seconds: of the processor on a CPU; elsewhere of the clock, when the device is done."""
    if device == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def main() -> None:
    """Measures, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    default = ROOT / "recipes" / "smollm2" / "declined.jsonl"
    parser.add_argument("--prompts", type=Path, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    loaded = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    engine = TransformersEngine(loaded)
    lines = arguments.prompts.read_text("utf-8").splitlines()
    token_ids = [render_chat(loaded.tokenizer, json.loads(line)["prompt"]) for line in lines]
    n, total = len(token_ids), sum(map(len, token_ids))
    width = round(total / n)
    rows = torch.randint(4, 100, (n, width), device=loaded.device)

    @torch.inference_mode()
    def bare() -> None:
        for batch in torch.split(rows, MAX_TOKENS // width):
            loaded.model.base_model(input_ids=batch, use_cache=False)

    def halves(**options: Any) -> list[MomentSet]:
        return [
            capture(engine, half, max_batch_tokens=MAX_TOKENS, **options)
            for half in (token_ids[::2], token_ids[1::2])
        ]

    passes: dict[str, Callable[[], object]] = {
        "bare": bare,
        "exact": halves,
        "share_prefix": lambda: halves(share_prefix=True),
        "left-padded": lambda: halves(padding="left"),
    }
    best = dict.fromkeys(passes, float("inf"))
    directions: dict[str, torch.Tensor] = {}
    for run in range(arguments.runs + 1):  # the first one warms up
        for name, do in passes.items():
            start = now(loaded.device)
            result = do()
            if run:
                best[name] = min(best[name], now(loaded.device) - start)
            if isinstance(result, list):
                directions[name] = result[0].mean - result[1].mean
    shared = shared_tokens(token_ids)
    print(f"{n} prompts, {total} tokens, {shared} of {width} are shared; best of {arguments.runs}")
    for name, seconds in best.items():
        line = f"{name:14} {seconds:7.2f} s  {total / seconds:8.0f} tokens/s"
        if name in directions:
            cosine = torch.cosine_similarity(directions[name], directions["exact"], dim=1)
            gap = float((1 - cosine).abs().max())
            line += f"  {best['bare'] / seconds:.2f} x bare  max |1 - cos| {gap:.1e}"
        print(line)


if __name__ == "__main__":
    main()
