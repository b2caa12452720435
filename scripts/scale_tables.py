"""Writes the tables of docs/scale.md, or checks that they are what the formulas say now.

usage: python scripts/scale_tables.py [--check]

A model of each size is laid out as headers and holes, as `abliterator plan` sees one on the Hub,
and the recipe of recipes/llama3_1_8b.yaml is estimated on machines that are assumed
(`abliterator.costs.ACCELERATORS`). Nothing is computed, and no GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from abliterator import costs, pipeline
from abliterator.devices import WEIGHTS_SHARE
from abliterator.recipe import load_recipe

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scale.md"
RECIPE = ROOT / "recipes" / "llama3_1_8b.yaml"
BEGIN, END = "<!-- scale_tables.py: begin -->\n", "<!-- scale_tables.py: end -->\n"

# Dollars an hour of one accelerator, rented; of a million tokens of a judge, in and out.
PRICES = {"l40s": 1.0, "a100": 1.8, "h100": 2.8, "h200": 3.6}
JUDGE = ("judge.kind=openai", "judge.prices.input=0.28", "judge.prices.output=0.42")
# Of vLLM on all devices, as a recipe would have it that wants answers fast.
ENGINE = ("engine.kind=vllm", "engine.concurrency=256")
HOST_CORES = 16

_LLAMA = {"model_type": "llama", "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256}
MODELS: dict[str, dict[str, Any]] = {
    "8B (Llama 3.1)": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "70B (Llama 3.1)": {
        **_LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "400B, 17B active (Llama 4 Maverick)": {
        "model_type": "llama4_text",
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 202048,
        "num_local_experts": 128,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
    },
}


class Machine(NamedTuple):
    """A model's name, an accelerator's, and how many of them."""

    model: str
    accelerator: str
    count: int


MACHINES = [
    *(Machine("8B (Llama 3.1)", name, 1) for name in ("l40s", "h100")),
    *(Machine("70B (Llama 3.1)", name, n) for name, n in (("a100", 4), ("h200", 2))),
    Machine("400B, 17B active (Llama 4 Maverick)", "h200", 8),
]


def lay_out(config: dict[str, Any], folder: Path) -> None:
    """Writes config.json, and one file of weights that is a header and a hole."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    stated = {**config, "tie_word_embeddings": False, "dtype": "bfloat16"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**stated), dtype=torch.bfloat16
        )
    header, offset = {}, 0
    for name, tensor in model.state_dict().items():
        end = offset + 2 * math.prod(tensor.shape)
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(stated), encoding="utf-8")
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


def seconds_of(estimate: pipeline.Estimate) -> dict[str, float]:
    """Seconds of every stage."""
    return {stage.stage: stage.seconds for stage in estimate.stages}


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, to two digits."""
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:.2g} {name}"
    return f"{max(1, round(seconds))} s"


def rows(folder: Path) -> tuple[list[list[str]], list[list[str]]]:
    """Cells of the table of times, and of that of memory, disk and money."""
    times, needs = [], []
    for machine in MACHINES:
        model = folder / str(list(MODELS).index(machine.model))
        if not model.is_dir():
            lay_out(MODELS[machine.model], model)
        overrides = [f"model={model}", *JUDGE]
        recipe = load_recipe(RECIPE, overrides=overrides)
        served = [*overrides, *ENGINE, f"engine.tensor_parallel={machine.count}"]
        served_recipe = load_recipe(RECIPE, overrides=served)
        rates = costs.assumed(costs.ACCELERATORS[machine.accelerator])
        setup = costs.Setup(devices=machine.count, bake_workers=HOST_CORES)
        estimate = pipeline.estimate_on(recipe, folder / "out", rates, setup=setup)
        by_engine = seconds_of(pipeline.estimate_on(served_recipe, folder / "out", rates))[
            "rollouts"
        ]
        plan = pipeline.plan_recipe(recipe, folder / "out")
        work = costs.Work(costs.shape_of(plan.checkpoint, plan.anatomy), rates)
        seconds = seconds_of(estimate)
        best = min(by_engine, seconds["rollouts"])
        total = estimate.seconds - seconds["rollouts"] + best
        name = f"{machine.count} x {rates.name}"
        stages = ("capture", "selection", "bake", "rollouts")
        times.append(
            [
                machine.model,
                name,
                *(duration(seconds[stage]) for stage in stages),
                duration(by_engine),
                *(duration(seconds[stage]) for stage in ("divergence", "benchmarks")),
                duration(total),
            ]
        )
        memory = costs.ACCELERATORS[machine.accelerator].memory
        judge = estimate.judge
        assert judge is not None
        needs.append(
            [
                machine.model,
                name,
                f"{work.weight_bytes / 1e9:.0f} GB",
                f"{machine.count * memory * WEIGHTS_SHARE / 1e9:.0f} GB",
                f"{estimate.host_memory / 1e9:.0f} GB",
                f"{(work.shape.stored + estimate.disk) / 1e9:.0f} GB",
                f"${total / 3600 * machine.count * PRICES[machine.accelerator]:.2f}",
                f"${judge.dollars or 0:.2f}",
            ]
        )
    return times, needs


def tables(folder: Path) -> str:
    """Both tables as Markdown."""
    from abliterator.tables import markdown_table

    times, needs = rows(folder)
    head = ["model", "machine", "capture", "sweep", "bake", "answers, transformers"]
    head += ["answers, engine", "divergence", "benchmarks", "whole build, the faster answers"]
    of_needs = ["model", "machine", "weights", "room for weights", "host memory", "disk"]
    of_needs += ["machine's price", "judge"]
    return f"{markdown_table(head, times)}\n\n{markdown_table(of_needs, needs)}\n"


def main() -> None:
    """Writes the page, or says that it is not what would be written."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    before, rest = PAGE.read_text("utf-8").split(BEGIN)
    old, after = rest.split(END)
    with tempfile.TemporaryDirectory() as scratch:
        new = "\n" + tables(Path(scratch)) + "\n"
    if not check:
        PAGE.write_text(before + BEGIN + new + END + after, "utf-8")
    elif new != old:
        sys.exit(f"{PAGE} is stale: run python scripts/scale_tables.py")


if __name__ == "__main__":
    main()
