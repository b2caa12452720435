"""Named lists of tasks."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import get_args

from abliterator.recipe import BenchmarkTask, Preset

PRESETS: tuple[Preset, ...] = get_args(Preset)

_LOCAL = ("everyday_choice.yaml", "sums_generation.yaml")
_NAMES = {
    "quick": ("arc_easy", "piqa", "winogrande"),
    "replication": ("arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande"),
    "damage": ("lambada_openai", "truthfulqa_mc2", "piqa", "mmlu_subset"),
}


def preset_tasks(preset: Preset | None) -> list[BenchmarkTask]:
    """The tasks of a preset; an empty list for None.

    - `demo`: two small tasks that come with the package, of choices and of generated answers; they
      need no Hub.
    - `quick`: the first 100 documents of three tasks.
    - `replication`: the five multiple-choice tasks of the replication whose figures recipes quote.
    - `damage`: what an edit breaks first: next words (LAMBADA), truthfulness, knowledge (six
      subjects of MMLU, and as `mmlu_subset` all their documents), common sense, and, through the
      chat template, sums worked out in many steps and instructions followed to the letter.
    """
    if preset is None:
        return []
    if preset == "demo":
        folder = Path(str(files("abliterator.benchmarks"))) / "local"
        return [BenchmarkTask(task=str(folder / name)) for name in _LOCAL]
    limit = 100 if preset == "quick" else None
    tasks = [BenchmarkTask(task=name, limit=limit) for name in _NAMES[preset]]
    if preset == "damage":
        tasks += [
            BenchmarkTask(task="gsm8k", limit=200, num_fewshot=5, chat_template=True),
            BenchmarkTask(task="ifeval", limit=200, chat_template=True),
        ]
    return tasks
