"""Bake speed and memory against a plain copy of the same files, and against loading and saving.

    python perf/bake_speed.py [--gigabytes 2] [--k 1] [--repeats 5] [--folder /somewhere]

Makes a synthetic Llama-shaped bfloat16 checkpoint in two shards, bakes a random subspace of rank k
into it on all cores and on one, and prints the ratios of the best walls of one run, and the least
processor seconds, which other processes on the machine disturb less. Each method runs in a process
of its own, so that its peak memory is its own. Walls are given twice: until the system has the last
byte (our fsync is left out), and until the disk has it (the others end with an fsync of each file).
At the end the bytes of both bakes are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HIDDEN, INTERMEDIATE, VOCABULARY = 2048, 5632, 32_000


def make_checkpoint(folder: Path, gigabytes: float) -> None:
    """Random weights of `gigabytes` in two shards, with an index and a config."""
    import torch
    from safetensors.torch import save_file

    per_layer = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * VOCABULARY * HIDDEN) / per_layer))
    names = {"model.embed_tokens": (VOCABULARY, HIDDEN), "lm_head": (VOCABULARY, HIDDEN)}
    for i in range(layers):
        block = f"model.layers.{i}"
        names |= {f"{block}.self_attn.{x}_proj": (HIDDEN, HIDDEN) for x in "qkvo"}
        names |= {f"{block}.mlp.{x}_proj": (INTERMEDIATE, HIDDEN) for x in ("gate", "up")}
        names[f"{block}.mlp.down_proj"] = (HIDDEN, INTERMEDIATE)
    half, weight_map = len(names) // 2, {}
    for shard, part in enumerate((list(names)[:half], list(names)[half:]), start=1):
        file = f"model-0000{shard}-of-00002.safetensors"
        tensors = {f"{n}.weight": torch.randn(names[n]).mul_(0.02).bfloat16() for n in part}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))


def copy(base: Path, out: Path, k: int) -> None:
    """What the file system can do: every file copied by the kernel."""
    out.mkdir()
    for path in base.iterdir():
        shutil.copyfile(path, out / path.name)


def bake(base: Path, out: Path, k: int, rounding: str, workers: int | None = None) -> None:
    """Ours."""
    from abliterator.anatomy import anatomy_of
    from abliterator.bake import bake, plan_edits
    from abliterator.checkpoint import Checkpoint
    from abliterator.recipe import Edit
    from abliterator.subspace import random_basis

    checkpoint = Checkpoint.open(base)
    settings = Edit(rounding=rounding)
    plan = plan_edits(checkpoint, anatomy_of(checkpoint.config), settings)
    bake(checkpoint, plan, random_basis(HIDDEN, k, seed=0), out, workers=workers)


def load_and_save(base: Path, out: Path, k: int) -> None:
    """The usual way: every shard loaded, edited in float32, saved."""
    import torch
    from safetensors.torch import load_file, save_file

    out.mkdir()
    q = torch.linalg.qr(torch.randn(HIDDEN, k)).Q
    for path in base.glob("*.safetensors"):
        tensors = load_file(path)
        for name, weight in tensors.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                wide = weight.float()
                tensors[name] = (wide - q @ (q.T @ wide)).bfloat16()
        save_file(tensors, out / path.name, metadata={"format": "pt"})


METHODS = {
    "copy": copy,
    "bake, nearest": lambda *a: bake(*a, "nearest"),
    "the same, one core": lambda *a: bake(*a, "nearest", 1),
    "bake, compensated": lambda *a: bake(*a, "compensated"),
    "its one core": lambda *a: bake(*a, "compensated", 1),
    "load and save": load_and_save,
}


def run_once(method: str, base: Path, out: Path, k: int, *, synced: bool) -> None:
    """Runs one method in this process and prints its seconds and its memory above the start."""
    # imports belong to the start, with their time and their memory
    import torch  # noqa: F401

    import abliterator.subspace  # noqa: F401

    sync = os.fsync
    os.fsync = lambda descriptor: None
    start_memory = _peak_kilobytes(reset=True)
    start, start_cpu = time.perf_counter(), time.process_time()
    METHODS[method](base, out, k)
    if synced:
        for path in out.iterdir():
            with path.open("rb") as stream:
                sync(stream.fileno())
    seconds = time.perf_counter() - start
    cpu = time.process_time() - start_cpu
    memory = _peak_kilobytes() - start_memory
    print(json.dumps({"seconds": seconds, "cpu": cpu, "megabytes": memory / 1024}))


def _peak_kilobytes(*, reset: bool = False) -> int:
    """Peak resident memory of this process (Linux), counted anew after a reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0])


def measure(method: str, base: Path, folder: Path, k: int, *, synced: bool) -> dict[str, float]:
    """One run in a process of its own, with the disk quiet."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run(["sync"], check=True)
    command = [sys.executable, __file__, "--once", method, str(base), str(out), "--k", str(k)]
    command += ["--synced"] if synced else []
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def main() -> None:
    """Prints one row a method, with ratios to the plain copy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--k", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where files are written")
    parser.add_argument("--once", nargs=3, metavar=("METHOD", "BASE", "OUT"))
    parser.add_argument("--synced", action="store_true", help="with --once: wait for the disk")
    arguments = parser.parse_args()
    if arguments.once:
        method, base, out = arguments.once
        run_once(method, Path(base), Path(out), arguments.k, synced=arguments.synced)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        (folder / "base").mkdir()
        make_checkpoint(folder / "base", arguments.gigabytes)
        total = sum(path.stat().st_size for path in (folder / "base").iterdir())
        print(f"{total / 1e9:.2f} GB, k = {arguments.k}, best of {arguments.repeats}")
        for synced in (False, True):
            runs: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
            for _ in range(arguments.repeats):
                for method in METHODS:
                    run = measure(method, folder / "base", folder, arguments.k, synced=synced)
                    runs[method].append(run)
            report(runs, "on the disk" if synced else "with the system")
        print("bytes of one core:", "the same" if same_bytes(folder, arguments.k) else "OTHERS")


def same_bytes(folder: Path, k: int) -> bool:
    """Whether both numbers of workers write the same weights."""
    from abliterator.files import sha256_of_file

    digests = []
    for workers in (1, None):
        shutil.rmtree(folder / "out", ignore_errors=True)
        bake(folder / "base", folder / "out", k, "compensated", workers)
        files = sorted((folder / "out").glob("*.safetensors"))
        digests.append([sha256_of_file(file) for file in files])
    return digests[0] == digests[1]


def report(runs: dict[str, list[dict[str, float]]], where: str) -> None:
    """One row a method: best wall and least memory of its runs."""
    reference = min(run["seconds"] for run in runs["copy"])
    print(f"until the last byte is {where}; the copy took {reference:.2f} s")
    for method, of_method in runs.items():
        best = min(run["seconds"] for run in of_method)
        cpu = min(run["cpu"] for run in of_method)
        memory = min(run["megabytes"] for run in of_method)
        print(
            f"{method:18s} {best / reference:6.2f} x copy   {cpu:6.2f} s of processors"
            f"   {memory:7.0f} MB above start"
        )


if __name__ == "__main__":
    main()
