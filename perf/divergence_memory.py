"""Peak memory of the divergence of a model against itself, over that of loading it alone.

    python perf/divergence_memory.py MODEL_FOLDER [PROMPTS]

Each is measured in a process of its own (peak resident memory of the process, libraries included),
in float32 on the CPU. Prompts are sentences of the package's fixed text, with numbers so that all
differ.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from abliterator.devices import release_memory
from abliterator.engines import Engine, TransformersEngine
from abliterator.evaluation import base_paths, measure_divergence, neutral_text
from abliterator.model import load_model, render_chat


def sentences(count: int) -> list[str]:
    """Prompts that all differ."""
    found = [part.strip() for text in neutral_text() for part in text.split(". ")]
    return [f"{i}. What do you think of this? {found[i % len(found)]}" for i in range(count)]


def load_alone(folder: Path) -> None:
    """The yardstick."""
    load_model(folder, device="cpu", dtype="float32")


def diverge(folder: Path, count: int) -> None:
    """The whole measurement, the model against itself."""
    held: dict[str, Engine] = {}

    def load(side: str) -> Engine:
        if side not in held:  # asked for again: the same one, as in the pipeline
            held.clear()
            release_memory()
            loaded = load_model(folder, device="cpu", dtype="float32")
            held[side] = TransformersEngine(loaded)
        return held[side]

    def render(engine: Engine) -> list[list[int]]:
        return [render_chat(engine.tokenizer, prompt) for prompt in sentences(count)]

    with tempfile.TemporaryDirectory(dir=".") as scratch:
        paths = base_paths(
            load("base"), render(load("base")), tokens=32, max_new_tokens=256, batch_size=16
        )
        file = Path(scratch) / "base_logits.bin"
        divergence = measure_divergence(load, render, paths, tokens=32, scratch=file)
    print(f"divergence: {divergence.kl}", file=sys.stderr)


def peak(*arguments: str) -> float:
    """Peak resident memory of this script in another process, in MiB."""
    command = [sys.executable, __file__, *arguments]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


if __name__ == "__main__":
    model, count, *part = [*sys.argv[1:], *["512"] * (len(sys.argv) == 2)]
    if part:
        load_alone(Path(model)) if part == ["load"] else diverge(Path(model), int(count))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    else:
        alone, with_divergence = peak(model, count, "load"), peak(model, count, "diverge")
        print(f"loading alone       {alone:8.0f} MiB")
        print(f"divergence, n {count:>5} {with_divergence:8.0f} MiB")
        print(f"ratio               {with_divergence / alone:8.2f}")
