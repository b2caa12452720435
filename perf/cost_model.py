"""What `plan` predicts of a build, against what the build takes, stage by stage.

usage: OMP_NUM_THREADS=1 python perf/cost_model.py demo|synthetic|FOLDER [--set KEY=VALUE ...]
           [--max-memory BYTES]

With --max-memory the rest of the weights lies on disk, from files that the system keeps in memory.

`synthetic` is a Llama of 0.5 GB with random weights, made for the run; FOLDER is a checkpoint such
as SmolLM2-135M-Instruct's. All three get the demo's recipe and prompts. The machine is measured
right before the build, in another process. Seconds are those of processors, of this process and its
children: with one thread, and on a machine that others use too, they are the ones that mean
something; wall time is printed beside them. Answers are predicted twice: at their greatest length,
as `plan` does, and at the length of the longest.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from abliterator import costs, pipeline
from abliterator.recipe import Recipe, load_recipe
from abliterator.source import headers_folder

T = TypeVar("T")
ROOT = Path(__file__).parents[1]
# Stages of a build as the estimate counts them.
PARTS = {"directions": "bake", "config": "bake", "adapter": "bake", "card": "record"}


class Meter(pipeline.Silent):
    """Seconds and peak memory between the beginnings of stages."""

    def __init__(self) -> None:
        self.cpu: dict[str, float] = defaultdict(float)
        self.wall: dict[str, float] = defaultdict(float)
        self.memory: dict[str, int] = defaultdict(int)
        self._now = ("prompts", _cpu(), time.perf_counter())

    def stage(self, name: str, *, done: bool) -> None:
        """Counts what has passed for the stage before."""
        before, cpu, wall = self._now
        self.cpu[before] += _cpu() - cpu
        self.wall[before] += time.perf_counter() - wall
        self.memory[before] = max(self.memory[before], _peak())
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
        self._now = (PARTS.get(name, name), _cpu(), time.perf_counter())


def _cpu() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _peak() -> int:
    """Bytes of the largest resident set since the peak was reset."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def make_synthetic(folder: Path) -> None:
    """A Llama of 0.5 GB with random weights and the demo's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with headers_folder("embedded:demo", revision=None) as demo:
        shutil.copytree(demo.folder, folder, dirs_exist_ok=True)
    config = LlamaConfig.from_pretrained(folder)
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 22}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64}
    config.update({**sizes, **heads, "max_position_embeddings": 512})
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def observed_tokens(out: Path) -> int:
    """Tokens of the longest answer of a build."""
    lines = (out / "work" / "rollouts.jsonl").read_text("utf-8").splitlines()
    return max(json.loads(line)["n_tokens"] for line in lines)


def predicted(
    recipe: Recipe, out: Path, machine: costs.Machine, setup: costs.Setup
) -> dict[str, costs.StageCost]:
    """The estimate of every stage on a machine."""
    stages = pipeline.estimate_on(recipe, out, machine, setup=setup).stages
    return {stage.stage: stage for stage in stages}


def measured_machine() -> costs.Machine:
    """This machine's rates, in seconds of processors."""
    return costs.calibrate("cpu", "float32", clock=time.process_time)


def planned_places(recipe: Recipe, out: Path, options: pipeline.Options) -> dict[str, int]:
    """Bytes of weights in each place."""
    where = pipeline.plan_recipe(recipe, out, options=options).where
    assert where is not None
    return where.places


def elsewhere(function: Callable[..., T], *arguments: Any) -> T:
    """The result of a function that a new process calls, so that this one imports nothing."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    """Calibrates, predicts, builds, and prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--max-memory", type=int)
    arguments = parser.parse_args()
    options = pipeline.Options(
        "auto" if arguments.max_memory else "cpu", "float32", arguments.max_memory
    )
    with tempfile.TemporaryDirectory() as scratch:
        model = {"demo": "embedded:demo", "synthetic": f"{scratch}/model"}.get(
            arguments.model, arguments.model
        )
        if arguments.model == "synthetic":
            elsewhere(make_synthetic, Path(model))
        recipe = load_recipe(
            ROOT / "recipes" / "demo.yaml", overrides=[f"model={model}", *arguments.overrides]
        )
        out = Path(scratch) / "out"
        machine = elsewhere(measured_machine)
        machine = machine.model_copy(update={"uncached_read": machine.disk_read})
        places = elsewhere(planned_places, recipe, out, options)
        setup = costs.Setup(places.get("disk", 0), streams="disk" in places)
        at_most = predicted(recipe, out, machine, setup)
        meter = Meter()
        pipeline.build(recipe, out, options=options, progress=meter)
        meter.stage("end", done=True)
        tokens = observed_tokens(out)
        rollouts = recipe.rollouts.model_copy(update={"max_new_tokens": tokens})
        divergence = recipe.divergence.model_copy(
            update={"tokens": min(tokens, recipe.divergence.tokens)}
        )
        changes = {"rollouts": rollouts, "divergence": divergence}
        as_long = predicted(recipe.model_copy(update=changes), out, machine, setup)
    report(meter, at_most, as_long)


def report(
    meter: Meter, at_most: dict[str, costs.StageCost], as_long: dict[str, costs.StageCost]
) -> None:
    """Prints predicted against measured."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
    meter.memory["benchmarks"] = max(meter.memory["benchmarks"], children)
    print("seconds of processors; predicted / measured, with answers as long as they were")
    print(f"{'stage':12}{'at most':>9}{'as long':>9}{'CPU':>9}{'ratio':>7}{'wall':>9}", end="")
    print(f"{'MB':>8}{'measured':>10}{'ratio':>7}")
    for name, stage in as_long.items():
        seconds, memory = stage.seconds, stage.host_memory
        print(
            f"{name:12}{at_most[name].seconds:9.2f}{seconds:9.2f}{meter.cpu[name]:9.2f}"
            f"{seconds / max(1e-9, meter.cpu[name]):7.2f}{meter.wall[name]:9.2f}"
            f"{memory / 1e6:8.0f}{meter.memory[name] / 1e6:10.0f}"
            f"{memory / max(1, meter.memory[name]):7.2f}"
        )
    total = sum(stage.seconds for stage in as_long.values())
    cpu, peak = sum(meter.cpu.values()), max(meter.memory.values())
    expected = max(stage.host_memory for stage in as_long.values())
    print(
        f"{'total':12}{sum(s.seconds for s in at_most.values()):9.2f}{total:9.2f}{cpu:9.2f}"
        f"{total / cpu:7.2f}{sum(meter.wall.values()):9.2f}"
        f"{expected / 1e6:8.0f}{peak / 1e6:10.0f}{expected / peak:7.2f}"
    )


if __name__ == "__main__":
    main()
