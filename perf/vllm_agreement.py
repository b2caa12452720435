"""Answers of vLLM against transformers', and a candidate as an adapter against it baked.

    python perf/vllm_agreement.py MODEL_FOLDER PROMPTS.jsonl --vllm-python vllm/bin/python

For each dtype: how many greedy answers of the base agree in their first 8 tokens. In bfloat16: the
largest difference of the first token's log-probabilities between adapter and baked checkpoint, both
by vLLM, beside that between bfloat16 and float32 of the baked checkpoint in this process. Exits
with 1 where fewer than 30 of 32 agree in float32, or the adapter differs by more than twice the
latter.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import torch

from abliterator.anatomy import anatomy_of
from abliterator.bake import bake, plan_edits
from abliterator.checkpoint import Checkpoint
from abliterator.diagnostics import find_vllm
from abliterator.engines import (
    CompletionClient,
    ServedEngine,
    TransformersEngine,
    VllmCheckpoint,
    VllmModel,
    WriterEdit,
    slots_for,
)
from abliterator.model import load_model, load_tokenizer, render_chat
from abliterator.recipe import STARTED_KEY, Edit, EngineSettings
from abliterator.subspace import random_basis

TOKENS = 8
LIKELIEST = 20  # first tokens that are compared; vLLM gives no more
LEAST_AGREEING = 30 / 32
MOST_NOISE = 2.0


def main() -> int:
    """Prints both comparisons as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--vllm-python")
    parser.add_argument("--n", type=int, default=32)
    arguments = parser.parse_args()
    lines = arguments.prompts.read_text(encoding="utf-8").splitlines()[: arguments.n]
    tokenizer = load_tokenizer(arguments.folder)
    prompts = [render_chat(tokenizer, json.loads(line)["prompt"]) for line in lines]
    settings = EngineSettings(kind="vllm", python=arguments.vllm_python)
    with tempfile.TemporaryDirectory(prefix="abliterator-") as scratch:
        agree = {
            dtype: agreeing(arguments.folder, prompts, settings, dtype, Path(scratch))
            for dtype in ("float32", "bfloat16")
        }
        print(json.dumps({"greedy_agree": agree, "of": len(prompts), "tokens": TOKENS}))
        apart = adapter_against_baked(arguments.folder, prompts, settings, Path(scratch))
        print(json.dumps(apart))
    agrees = agree["float32"] >= LEAST_AGREEING * len(prompts)
    return 0 if agrees and apart["ratio_of_medians"] <= MOST_NOISE else 1


@contextmanager
def served(
    folder: Path, settings: EngineSettings, dtype: str, scratch: Path, *, slots: Any = None
) -> Iterator[ServedEngine]:
    """An engine whose answers come from vLLM."""
    tokenizer = load_tokenizer(folder)
    with tempfile.TemporaryDirectory(dir=scratch) as own:
        model = VllmModel(
            find_vllm(settings.python),
            VllmCheckpoint(folder, "base", dtype, slots=slots),
            settings,
            f"{folder} {dtype}",
            CompletionClient(
                settings.server("base", model="base"), tokenizer, cache=Path(own) / "answers.sqlite"
            ),
            log=scratch / "vllm.log",
            scratch=Path(own) / "adapters",
            note=lambda line: print(line, file=sys.stderr),
        )
        try:
            yield ServedEngine(folder, tokenizer, model, passes=lambda: in_process(folder, dtype))
        finally:
            model.close()


def in_process(folder: Path, dtype: str) -> TransformersEngine:
    """The model in this process."""
    return TransformersEngine(load_model(folder, device="cpu", dtype=dtype))


def agreeing(
    folder: Path,
    prompts: Sequence[Sequence[int]],
    settings: EngineSettings,
    dtype: str,
    scratch: Path,
) -> int:
    """How many greedy answers begin with the same tokens."""
    own = in_process(folder, dtype).answers(prompts, max_new_tokens=TOKENS, batch_size=1)
    with served(folder, settings, dtype, scratch) as engine:
        others = engine.answers(prompts, max_new_tokens=TOKENS, batch_size=len(prompts))
    return sum(a.token_ids == b.token_ids for a, b in zip(own, others, strict=True))


def adapter_against_baked(
    folder: Path, prompts: Sequence[Sequence[int]], settings: EngineSettings, scratch: Path
) -> dict[str, float]:
    """Largest differences of the first token's log-probabilities, nats: medians over prompts."""
    checkpoint = Checkpoint.open(folder)
    plan = plan_edits(checkpoint, anatomy_of(checkpoint.config), Edit())
    basis = random_basis(plan.d_model, 1, seed=0)
    baked = scratch / "baked"
    bake(checkpoint, plan, basis, baked)
    with served(folder, settings, "bfloat16", scratch, slots=slots_for(plan, 1)) as engine:
        base = first_tokens(engine, "base", prompts)
        with engine.served.under(WriterEdit(plan, basis)) as model:
            assert model is not None
            by_adapter = first_tokens(engine, model.name, prompts)
    with served(baked, settings, "bfloat16", scratch) as engine:
        by_vllm = first_tokens(engine, "base", prompts)
    rounded, exact = (own_first_tokens(baked, prompts, dtype) for dtype in ("bfloat16", "float32"))
    adapter = largest(by_adapter, by_vllm)
    noise = largest(rounded, [{i: e[i] for i in v} for e, v in zip(exact, by_vllm, strict=True)])
    middle = {"adapter_baked": median(adapter), "bf16_fp32": median(noise)}
    return {
        **middle,
        "ratio_of_medians": middle["adapter_baked"] / middle["bf16_fp32"],
        "adapter_baked_max": max(adapter),
        "bf16_fp32_max": max(noise),
        "edit_itself": median(largest(by_adapter, base)),
    }


def first_tokens(
    engine: ServedEngine, name: str, prompts: Sequence[Sequence[int]]
) -> list[dict[int, float]]:
    """Log-probabilities of the likeliest first tokens, by token id, as vLLM has them."""
    assert isinstance(engine.served, VllmModel)
    url = engine.served.base_url
    rows = []
    for prompt in prompts:
        body = {
            "model": name, "prompt": list(prompt), "max_tokens": 1, "temperature": 0,
            "logprobs": LIKELIEST, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        headers = {
            "Authorization": f"Bearer {os.environ[STARTED_KEY]}",
            "Content-Type": "application/json",
        }
        request = Request(f"{url}/completions", json.dumps(body).encode(), headers)
        with urlopen(request) as reply:
            (top,) = json.load(reply)["choices"][0]["logprobs"]["top_logprobs"]
        rows.append({int(token.rpartition(":")[2]): value for token, value in top.items()})
    return rows


def own_first_tokens(
    folder: Path, prompts: Sequence[Sequence[int]], dtype: str
) -> list[dict[int, float]]:
    """Log-probabilities of every first token, by token id, in this process."""
    loaded = load_model(folder, device="cpu", dtype=dtype)
    rows = []
    for prompt in prompts:
        with torch.inference_mode():
            logits = loaded.model(torch.tensor([list(prompt)])).logits[0, -1]
        rows.append(dict(enumerate(logits.float().log_softmax(-1).tolist())))
    return rows


def largest(some: list[dict[int, float]], others: list[dict[int, float]]) -> list[float]:
    """Per prompt, the largest difference over tokens that both have."""
    return [
        max(abs(a[token] - b[token]) for token in a.keys() & b.keys())
        for a, b in zip(some, others, strict=True)
    ]


def median(values: list[float]) -> float:
    """The upper median."""
    return sorted(values)[len(values) // 2]


if __name__ == "__main__":
    raise SystemExit(main())
