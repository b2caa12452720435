"""Named lists of tasks; `presets.yaml` has them."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import get_args

import yaml

from abliterator.recipe import BenchmarkTask, Preset

PRESETS: tuple[Preset, ...] = get_args(Preset)


def preset_tasks(preset: Preset | None) -> list[BenchmarkTask]:
    """The tasks of a preset; an empty list for None."""
    if preset is None:
        return []
    folder = Path(str(files("abliterator.benchmarks")))
    entries = yaml.safe_load((folder / "presets.yaml").read_text("utf-8"))[preset]
    tasks = [BenchmarkTask.model_validate(entry) for entry in entries]
    return [
        task.model_copy(update={"task": str(folder / task.task)}) if "/" in task.task else task
        for task in tasks
    ]
