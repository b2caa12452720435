"""`abliterator compare`: any two checkpoints, measured."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from abliterator.cli._options import (
    FILE,
    JSON,
    VLLM_PYTHON,
    checkpoint_folder,
    computing_arguments,
    judge_arguments,
    read_judge,
    worker_arguments,
)
from abliterator.cli._terminal import Bars, show

if TYPE_CHECKING:
    from abliterator.benchmarks import RunSettings, Task
    from abliterator.comparison import CompareSettings
    from abliterator.judge import Judge
    from abliterator.pipeline import JudgeHost, Options
    from abliterator.prompts import Prompt
    from abliterator.recipe import EngineSettings
    from abliterator.record import Comparison, Side


@click.command(short_help="Compare any two checkpoints.")
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
@VLLM_PYTHON
@click.option("--details", is_flag=True, help="List every tensor that differs, up to 200.")
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
    vllm_python: str | None,
    details: bool,
    ray: str | None,
    workers: int | None,
    as_json: bool,
    **judge_options: Any,
) -> None:
    """Compare two checkpoints: how they differ, and what that does.

    BASE and EDITED are Hub ids or folders. Weights, chat template, tokenizer and config are always
    compared; --target and --neutral let both answer, --neutral measures divergence, --tasks runs
    lm-eval. An API judge: --recipe, or --set judge.base_url=URL --set judge.model=NAME. A judge in
    this process: --judge local --set judge.model=ID-OR-FOLDER (`base` is BASE). A server
    that answers: --set engine.kind=server --set engine.base_url=URL --set engine.base=NAME --set
    engine.edited=NAME, and engine.edited_url where that is another server. vLLM, started for both:
    --set engine.kind=vllm.
    """
    from abliterator.benchmarks import require_engine
    from abliterator.comparison import CompareSettings, to_markdown
    from abliterator.diagnostics import find_vllm
    from abliterator.files import cache_folder
    from abliterator.pipeline import Options

    options = Options(device, dtype, max_memory, ray=ray, workers=workers)
    computes = options.compute_device  # an absent one is an error before anything is downloaded
    folder = checkpoint_folder(base)
    engine, judge_options["overrides"] = _engine(judge_options["overrides"], base)
    settings = CompareSettings(
        prompts=_prompts(limit, target=target, neutral=neutral),
        tasks=_tasks(tasks),
        max_new_tokens=max_new_tokens,
        benchmarks=_run_settings(engine, options, folder, limit=task_limit),
        engine=engine,
        answers=cache_folder() / "answers.sqlite",
        vllm=find_vllm(vllm_python or engine.python) if engine.kind == "vllm" else None,
    )
    if any(task.skill is None for task in settings.tasks):
        sides: tuple[Side, ...] = () if settings.vllm else ("base", "edited")
        require_engine(settings.benchmarks.section.engine, computes, sides=sides)
    comparison = _measured(folder, edited, settings, options, judge_options)
    show(comparison, partial(to_markdown, details=details), as_json=as_json)


def _measured(
    folder: Path,
    edited: str,
    settings: CompareSettings,
    options: Options,
    judge_options: Mapping[str, Any],
) -> Comparison:
    """The comparison of the base in `folder` with `edited`, under progress bars."""
    from abliterator.comparison import compare as compare_checkpoints
    from abliterator.pipeline import JudgeHost
    from abliterator.source import ModelSource
    from abliterator.workers import open_pool

    bars = Bars()
    host = JudgeHost(options, ModelSource(folder, str(folder), None), note=bars.note)
    judge = _judge(bars, host, **judge_options)
    with (
        tempfile.TemporaryDirectory(prefix="abliterator-") as scratch,
        nullcontext() if options.pool is None else open_pool(options.pool) as pool,
    ):
        return compare_checkpoints(
            folder,
            checkpoint_folder(edited),
            replace(settings, pool=pool),
            judge,
            scratch=Path(scratch),
            bar=bars.bar,
            note=bars.note,
        )


def _prompts(limit: int, **paths: Path | None) -> dict[str, tuple[Prompt, ...]]:
    """The first `limit` prompts of each file that is given, by the set's name."""
    from abliterator.prompts import load_prompts
    from abliterator.recipe import Source

    return {
        name: load_prompts(name, Source(path=path, limit=limit)).prompts
        for name, path in paths.items()
        if path is not None
    }


def _run_settings(
    engine: EngineSettings, options: Options, folder: Path, *, limit: int
) -> RunSettings:
    """How benchmarks of at most `limit` documents run: by a server that `engine` names, or here."""
    from abliterator.benchmarks import RunSettings
    from abliterator.checkpoint import Checkpoint
    from abliterator.recipe import BenchmarkEngine, Benchmarks

    served = engine.benchmark_engine(engine.base or "")
    return RunSettings(
        section=Benchmarks(preset=None, limit=limit, engine=served or BenchmarkEngine()),
        dtype=options.compute_dtype(Checkpoint.open(folder)),
        **options.weights,
    )


def _engine(overrides: tuple[str, ...], base: str) -> tuple[EngineSettings, tuple[str, ...]]:
    """The engine that `--set engine.KEY=VALUE` gives, and all other overrides.

    By default a server has the base under the name that the command gives it.
    """
    from abliterator.recipe import load_engine

    engine = load_engine([x for x in overrides if x.startswith("engine.")])
    others = tuple(x for x in overrides if not x.startswith("engine."))
    if engine.kind == "vllm":
        return engine, others
    return engine.model_copy(update={"base": engine.base or base}), others


def _judge(bars: Bars, host: JudgeHost, **arguments: Any) -> Judge:
    """The judge that the options name, after checking that its key is set."""
    from abliterator.files import cache_folder
    from abliterator.pipeline import judge_of, note_plain_http, require_key

    settings = read_judge(**arguments)
    require_key(settings)
    note_plain_http(settings, bars)
    return judge_of(settings, cache=cache_folder() / "judge.sqlite", host=host)


def _tasks(names: str) -> list[Task]:
    from abliterator.benchmarks import PRESETS, preset_tasks, resolve_tasks

    requests: list[Any] = []
    for name in filter(None, names.split(",")):
        requests += preset_tasks(name) if name in PRESETS else [name]
    return resolve_tasks(requests, folder=Path.cwd()) if requests else []
