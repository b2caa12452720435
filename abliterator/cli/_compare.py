"""`abliterator compare`: any two checkpoints, measured."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from abliterator.cli._options import (
    FILE,
    JSON,
    computing_arguments,
    judge_arguments,
    read_judge,
    worker_arguments,
)
from abliterator.cli._terminal import Bars, show

if TYPE_CHECKING:
    from abliterator.benchmarks import Task
    from abliterator.judge import Judge


@click.command()
@click.argument("base")
@click.argument("edited")
@click.option("--target", type=FILE, help="Prompts on which the behaviour shows: .txt or .jsonl.")
@click.option("--neutral", type=FILE, help="Prompts that must stay as they were: .txt or .jsonl.")
@click.option(
    "--tasks", default="", help="Benchmarks: names, YAML files or a preset, between commas."
)
@click.option(
    "--limit", type=click.IntRange(1), default=100, show_default=True, help="Prompts of each file."
)
@click.option("--task-limit", default=500, show_default=True, help="Documents of each task.")
@click.option("--max-new-tokens", default=256, show_default=True, help="Tokens of an answer.")
@computing_arguments
@worker_arguments
@judge_arguments
@JSON
def compare(
    base: str,
    edited: str,
    target: Path | None,
    neutral: Path | None,
    tasks: str,
    limit: int,
    task_limit: int,
    max_new_tokens: int,
    device: str,
    dtype: str,
    max_memory: int | None,
    ray: str | None,
    workers: int | None,
    as_json: bool,
    **judge_options: Any,
) -> None:
    """Compare two checkpoints: how they differ, and what that does.

    BASE and EDITED are Hub ids or folders. Weights, chat template, tokenizer and config are always
    compared; --target and --neutral let both answer, --neutral measures divergence, --tasks runs
    lm-eval. An API judge: --recipe, or --set judge.base_url=URL --set judge.model=NAME.
    """
    from abliterator.benchmarks import RunSettings, require_engine
    from abliterator.checkpoint import Checkpoint
    from abliterator.comparison import CompareSettings, to_markdown
    from abliterator.comparison import compare as compare_checkpoints
    from abliterator.pipeline import Options
    from abliterator.prompts import load_prompts
    from abliterator.recipe import Benchmarks, Source
    from abliterator.workers import open_pool

    folder, options = _folder(base), Options(device, dtype, max_memory, ray=ray, workers=workers)
    settings = CompareSettings(
        prompts={
            name: load_prompts(name, Source(path=path, limit=limit)).prompts
            for name, path in (("target", target), ("neutral", neutral))
            if path is not None
        },
        tasks=_tasks(tasks),
        max_new_tokens=max_new_tokens,
        batch_size=options.batch_size("auto"),
        benchmarks=RunSettings(
            section=Benchmarks(preset=None, limit=task_limit),
            dtype=options.compute_dtype(Checkpoint.open(folder)),
            **options.weights,
        ),
    )
    if settings.tasks:
        require_engine(settings.benchmarks.section.engine, options.compute_device)
    bars = Bars()
    judge = _judge(bars, **judge_options)
    with (
        tempfile.TemporaryDirectory(prefix="abliterator-") as scratch,
        nullcontext() if options.pool is None else open_pool(options.pool) as pool,
    ):
        comparison = compare_checkpoints(
            folder,
            _folder(edited),
            replace(settings, pool=pool),
            judge,
            scratch=Path(scratch),
            bar=bars.bar,
            note=bars.note,
        )
    show(comparison, to_markdown, as_json=as_json)


def _judge(bars: Bars, **arguments: Any) -> Judge:
    """The judge that the options name, after checking that its key is set."""
    from abliterator.judge import cache_folder
    from abliterator.pipeline import judge_of, note_plain_http, require_key

    settings = read_judge(**arguments)
    require_key(settings)
    note_plain_http(settings, bars)
    return judge_of(settings, cache=cache_folder() / "judge.sqlite")


def _folder(model: str) -> Path:
    """The checkpoint of a Hub id, a folder, or the folder of an earlier run."""
    from abliterator.source import resolve_folder

    if (Path(model) / "checkpoint" / "config.json").is_file():
        return Path(model) / "checkpoint"
    return resolve_folder(model, revision=None).folder


def _tasks(names: str) -> list[Task]:
    from abliterator.benchmarks import PRESETS, preset_tasks, resolve_tasks

    requests: list[Any] = []
    for name in filter(None, names.split(",")):
        requests += preset_tasks(name) if name in PRESETS else [name]
    return resolve_tasks(requests, folder=Path.cwd()) if requests else []
