"""The benchmark tasks of a recipe before lm-eval is imported: their sequences, about."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from abliterator.costs import Benchmark
from abliterator.errors import FileError
from abliterator.files import package_yaml, read_lines, read_text
from abliterator.recipe import Benchmarks, BenchmarkTask

_CHARACTERS_A_TOKEN = 4


def planned_benchmarks(section: Benchmarks, template_tokens: int) -> list[Benchmark]:
    """The size of every task of a recipe's section, in order.

    Of a task file those of the JSON lines that it names, of lm-eval's own tasks as listed in
    `benchmark_sizes.yaml`; of a task that is not there, an ordinary size.

    Args:
        section: of the recipe.
        template_tokens: that the model's chat template puts around a document.
    """
    # a file of `abliterator.benchmarks`, which is not imported: it needs numpy
    presets = package_yaml("abliterator", "benchmarks/presets.yaml")
    tasks = [BenchmarkTask(**entry) for entry in presets.get(section.preset, ())]
    tasks += [
        task if isinstance(task, BenchmarkTask) else BenchmarkTask(task=task)
        for task in section.tasks
    ]
    return [_sized(task, section, template_tokens) for task in tasks]


def _sized(task: BenchmarkTask, section: Benchmarks, template_tokens: int) -> Benchmark:
    listed = package_yaml("abliterator.pipeline._planning", "benchmark_sizes.yaml")
    size = _of_file(Path(task.task)) or listed.get(task.task) or listed["other"]
    limit = task.limit or section.limit or size["documents"]
    shots = next(
        (n for n in (task.num_fewshot, section.num_fewshot) if n is not None), size.get("shots", 0)
    )
    in_chat = section.chat_template if task.chat_template is None else task.chat_template
    tokens = size["tokens"] * (1 + shots) + template_tokens * in_chat
    documents = min(limit, size["documents"])
    return Benchmark(documents, size["requests"], tokens, size.get("generated", 0))


def _of_file(path: Path) -> dict[str, int] | None:
    """The size of a task file by its JSON lines; None where they are not at hand."""
    with suppress(FileError, yaml.YAMLError, AttributeError, TypeError, ValueError, OSError):
        task = yaml.load(read_text(path), _Loader)
        (data,) = task["dataset_kwargs"]["data_files"].values()
        rows = [json.loads(line) for line in read_lines(path.parent / data)]
        choices = max(1, *(_choices(row) for row in rows[:20]))
        characters = sum(len(json.dumps(row)) for row in rows[:20]) / len(rows[:20]) / choices
        generates = task.get("output_type") == "generate_until"
        generated = task.get("generation_kwargs", {}).get("max_gen_toks", 256) if generates else 0
        tokens = max(1, round(characters / _CHARACTERS_A_TOKEN))
        return {
            "documents": len(rows),
            "requests": 1 if generates else choices,
            "tokens": tokens,
            "generated": generated,
        }
    return None


def _choices(row: Mapping[str, Any]) -> int:
    lists = [value for value in row.values() if isinstance(value, list)]
    return max(map(len, lists), default=1)


class _Loader(yaml.SafeLoader):
    """Reads lm-eval's task files, whose tag `!function` means code that is not run here."""


_Loader.add_constructor("!function", lambda loader, node: None)
