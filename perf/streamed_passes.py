"""Capture and KL of a model read block by block against the same model in memory.

    python perf/streamed_passes.py TOKENIZER_FOLDER [--gigabytes 4] [--prompts 64] [--runs 5]

Makes a Llama of random bfloat16 weights with the tokenizer of another model, saves it, and measures
it both ways in turns, each time in a process of its own: peak resident memory above what the
process had before, wall time of the two measurements alone and with loading, processor time (which
says more beside other work), and whether the bytes of all results are equal. The hidden states of
the prompts lie in memory up to --activations bytes.

A process has opened and run a model of one small block, with the same tokenizer, when memory is
first read: libraries are no part of it. The peak is Linux's VmHWM. (getrusage's ru_maxrss would
begin with that of the process that made the model.) It counts pages of weight files, which the
kernel can drop; the largest anonymous memory alone, sampled, is shown beside it.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from abliterator.anatomy import anatomy_of
from abliterator.bake import plan_edits
from abliterator.capture import capture
from abliterator.checkpoint import Checkpoint
from abliterator.engines import AnswerPath, Engine, TransformersEngine, WriterEdit, open_streamed
from abliterator.evaluation import kl_terms
from abliterator.model import load_model
from abliterator.recipe import Edit
from abliterator.subspace import orthonormal_basis

SMALL = "small"  # folder of the small model, inside that of the large one


def make_model(folder: Path, tokenizer: Path, gigabytes: float) -> None:
    """Saves a random Llama of about this size, one shard in memory at a time; 0 is the smallest."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    words = AutoTokenizer.from_pretrained(tokenizer)
    d_model = 2048 if gigabytes >= 2 else 1024 if gigabytes else 64
    config = LlamaConfig(
        hidden_size=d_model,
        intermediate_size=d_model * 11 // 4,
        num_attention_heads=d_model // 64,
        num_key_value_heads=d_model // 64,
        vocab_size=32000,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        dtype="bfloat16",
        num_hidden_layers=1,
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        one = {name: t.shape for name, t in LlamaForCausalLM(config).state_dict().items()}
    block = {name: shape for name, shape in one.items() if ".layers.0." in name}
    sizes = [2 * sum(map(math.prod, shapes.values())) for shapes in (one, block)]
    layers = max(1, round((gigabytes * 1e9 - sizes[0]) / sizes[1]) + 1)
    config.num_hidden_layers = layers
    folder.mkdir(exist_ok=True)
    config.save_pretrained(folder)
    words.save_pretrained(folder)
    assert AutoConfig.from_pretrained(folder).num_hidden_layers == layers
    torch.manual_seed(0)
    outside = {name: shape for name, shape in one.items() if name not in block}
    shards = [outside] + [
        {name.replace(".layers.0.", f".layers.{i}."): shape for name, shape in block.items()}
        for i in range(layers)
    ]
    places = {}
    for number, shapes in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: torch.randn(shape).mul_(0.02).bfloat16() for name, shape in shapes.items()}
        for name in tensors:
            if "norm" in name:
                tensors[name] += 1
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    index = json.dumps({"metadata": {}, "weight_map": places})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")


def measure(engine: Engine, folder: Path, count: int) -> str:
    """SHA-256 of the captured moments and of the KL of an edit."""
    generator = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(1000, 30000, (20 + i % 16,), generator=generator).tolist()
        for i in range(count)
    ]
    moments = capture(engine, prompts)
    checkpoint = Checkpoint.open(folder)
    plan = plan_edits(checkpoint, anatomy_of(checkpoint.config), Edit())
    basis = orthonormal_basis(torch.randn(1, engine.hidden_shape[1], generator=generator))
    paths = [AnswerPath(tuple(prompt), 8) for prompt in prompts[: count // 4]]
    base = dict(engine.logits(paths, max_batch_tokens=1024))
    kl = {}
    with engine.edited(WriterEdit(plan, basis)):
        for index, logits in engine.logits(paths, max_batch_tokens=1024):
            pair = (x.float().log_softmax(-1) for x in (base.pop(index), logits))
            kl[index] = kl_terms(*pair).sum(-1)
    results = [moments.mean, *(kl[i] for i in sorted(kl))]
    digest = hashlib.sha256()
    for tensor in results:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def memory(key: str) -> int:
    """Bytes of this process's memory, by a key of /proc/self/status."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    match = re.search(rf"^{key}:\s*(\d+) kB$", status, re.MULTILINE)
    assert match, f"no {key} in /proc/self/status"
    return int(match[1]) * 1024


def sample(key: str, sizes: list[int]) -> None:
    """Adds memory by a key, every 5 ms."""
    while True:
        sizes.append(memory(key))
        time.sleep(0.005)


def open_engine(kind: str, folder: Path, activations: int) -> Engine:
    """The model in a folder, "streamed" or "in memory"."""
    if kind == "streamed":
        return open_streamed(folder, device="cpu", dtype=None, activation_bytes=activations)
    return TransformersEngine(load_model(folder, device="cpu", dtype=None))


def child(kind: str, folder: Path, count: int, activations: int) -> None:
    """One measurement, printed as JSON."""
    measure(open_engine(kind, folder / SMALL, activations), folder / SMALL, 8)
    gc.collect()
    start, before = time.perf_counter(), memory("VmRSS")
    anonymous = [memory("RssAnon")]
    threading.Thread(target=sample, args=("RssAnon", anonymous), daemon=True).start()
    engine = open_engine(kind, folder, activations)
    loaded, processor = time.perf_counter(), time.process_time()
    digest = measure(engine, folder, count)
    end, peak = time.perf_counter(), memory("VmHWM")
    figures = {"digest": digest, "passes": end - loaded, "all": end - start}
    seconds = time.process_time() - processor
    sizes = {"memory": peak - before, "anonymous": max(anonymous) - anonymous[0]}
    print(json.dumps({**figures, "processor": seconds, **sizes}))


def main() -> None:
    """Makes the model, measures in turns, prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--activations", type=int, default=64 << 20)
    parser.add_argument("--out", type=Path, default=None, help="where the model is kept meanwhile")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        count, activations = arguments.prompts, arguments.activations
        child(arguments.child, arguments.tokenizer, count, activations)
        return
    runs: dict[str, list[dict[str, float]]] = {"in memory": [], "streamed": []}
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.out) as name:
        folder = Path(name)
        make_model(folder, arguments.tokenizer, arguments.gigabytes)
        make_model(folder / SMALL, arguments.tokenizer, 0)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        options = ["--prompts", str(arguments.prompts)]
        options += ["--activations", str(arguments.activations)]
        for _ in range(arguments.runs):
            for kind, results in runs.items():
                command = [sys.executable, __file__, str(folder), "--child", kind, *options]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                results.append(json.loads(done.stdout.splitlines()[-1]))
                print(f"{kind:<10} {results[-1]}", file=sys.stderr)
    print(f"{size / 1e9:.2f} GB of bfloat16, {arguments.prompts} prompts, best of {arguments.runs}")
    best = {
        kind: {key: min(r[key] for r in results) for key in results[0] if key != "digest"}
        for kind, results in runs.items()
    }
    for kind, figures in best.items():
        print(
            f"{kind:<10} capture and KL {figures['passes']:7.1f} s, with loading "
            f"{figures['all']:7.1f} s, peak memory {figures['memory'] / size:6.1%} of the model, "
            f"{figures['anonymous'] / size:.1%} anonymous"
        )
    keys = ("passes", "all", "processor")
    ratios = [best["streamed"][key] / best["in memory"][key] for key in keys]
    digests = {result["digest"] for results in runs.values() for result in results}
    print(
        f"ratio of time    {ratios[0]:.2f}, with loading {ratios[1]:.2f}, of processor time "
        f"{ratios[2]:.2f}"
    )
    print(f"bits             {'equal' if len(digests) == 1 else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
