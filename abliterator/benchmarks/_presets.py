"""Named lists of tasks."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal, get_args

from abliterator.benchmarks._scores import Aggregate
from abliterator.benchmarks._tasks import TaskRequest

Preset = Literal["demo", "quick", "replication", "damage"]
PRESETS: tuple[Preset, ...] = get_args(Preset)

_REPLICATION = ("arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande")
# A science, a humanity, a trade and a sum from each end of MMLU's difficulty.
_MMLU = (
    "mmlu_elementary_mathematics",
    "mmlu_high_school_geography",
    "mmlu_college_biology",
    "mmlu_computer_security",
    "mmlu_philosophy",
    "mmlu_professional_medicine",
)
_MMLU_SUBSET = Aggregate(group="mmlu_subset", metric="acc")
_LOCAL = ("everyday_choice.yaml", "sums_generation.yaml")


def preset_tasks(preset: Preset) -> list[TaskRequest]:
    """The tasks of a preset.

    - `demo`: two small tasks that come with the package, of choices and of generated answers; they
      need no Hub.
    - `quick`: the first 100 documents of three tasks.
    - `replication`: the five multiple-choice tasks of the replication whose figures recipes quote.
    - `damage`: what an edit breaks first: next words (LAMBADA), truthfulness, knowledge (six
      subjects of MMLU, and as `mmlu_subset` all their documents), common sense, and, through the
      chat template, sums worked out in many steps and instructions followed to the letter.
    """
    if preset == "demo":
        folder = Path(str(files("abliterator.benchmarks"))) / "local"
        return [TaskRequest(str(folder / name)) for name in _LOCAL]
    if preset == "quick":
        return [TaskRequest(name, limit=100) for name in ("arc_easy", "piqa", "winogrande")]
    if preset == "replication":
        return [TaskRequest(name) for name in _REPLICATION]
    return [
        *(TaskRequest(name) for name in ("lambada_openai", "truthfulqa_mc2", "piqa")),
        *(TaskRequest(name, aggregates=(_MMLU_SUBSET,)) for name in _MMLU),
        TaskRequest("gsm8k", limit=200, num_fewshot=5, chat_template=True),
        TaskRequest("ifeval", limit=200, chat_template=True),
    ]
