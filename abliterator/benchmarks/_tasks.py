"""Tasks found, checked and loaded with their documents, before any model is."""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from abliterator.benchmarks._contain import lm_eval_contained
from abliterator.errors import BenchmarkError

LENGTH_NORMALISED = frozenset({"arc_easy", "arc_challenge", "hellaswag", "piqa"})
PREFERRED_METRICS = ("acc", "acc_norm", "exact_match")

# `datasets` reads these from files; any other dataset_path is the id of a dataset on the Hub.
_FILE_FORMATS = frozenset({"arrow", "csv", "json", "parquet", "text"})
# Settings by which a task file reaches for other files, of which some may hold code.
_OUTWARD_SETTINGS = ("include", "group", "use_prompt")


@dataclass(frozen=True)
class Task:
    """A task that was found, loaded once and can be run.

    `digest` covers lm-eval's version and either the task file with all its data files, or the name
    of lm-eval's own task. `spec` is what lm-eval loads it from: our settings, or the path of its
    own YAML.
    """

    name: str
    digest: str
    metric: str
    higher_is_better: bool
    version: str
    documents: int  # how many there are, before any limit
    spec: str | Mapping[str, Any]


def resolve_tasks(tasks: Sequence[str], *, folder: Path) -> list[Task]:
    """Find, check and load every task and its documents, without any model.

    Args:
        tasks: paths of task files (`.yaml`, relative to `folder`), or names of lm-eval's tasks.
        folder: the recipe's folder.

    Raises:
        BenchmarkError: for a task that is unknown, is code, lacks its data (a missing file, or a
            Hub dataset out of reach), is listed twice, or has no metric that can be paired.
    """
    resolved: list[Task] = []
    with lm_eval_contained():
        # The index of lm-eval's own tasks is 13,000 files and takes seconds: only if one is named.
        named = not all(map(_is_file, tasks))
        manager = _task_manager(index=True) if named else None
        for task in tasks:
            found = _local_task(folder / task) if _is_file(task) else _named_task(task, manager)
            if any(found.name == other.name for other in resolved):
                raise BenchmarkError(
                    f"The benchmark task {found.name!r} is listed twice, but results are kept by "
                    "task name. Remove one of the two, or give one of the files another `task:` "
                    "name."
                )
            resolved.append(found)
    return resolved


def load(name: str, spec: str | Mapping[str, Any], *, where: str) -> Any:
    """lm-eval's own task object, fresh; it reads the documents and renders the first one."""
    import jinja2
    from datasets.exceptions import DatasetsError

    try:
        # A copy, because lm-eval keeps and edits what it is given.
        return _task_manager(index=False).load([copy.deepcopy(spec)])["tasks"][name]
    except OSError as error:
        raise BenchmarkError(
            f"The documents of the benchmark task {name!r} ({where}) cannot be had: {error}. "
            "Connect to the Hugging Face Hub once so that they are cached (without "
            "HF_HUB_OFFLINE; gated data needs HF_TOKEN), or choose a local task."
        ) from error
    except ImportError as error:
        raise BenchmarkError(
            f"The benchmark task {name!r} needs a package that is not installed: {error}. Install "
            "it, or leave the task out."
        ) from error
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        AssertionError,
        jinja2.TemplateError,
        DatasetsError,
    ) as error:
        raise BenchmarkError(
            f"lm-eval cannot load the benchmark task {name!r} ({where}): {type(error).__name__}: "
            f"{error}. Check the task's settings against lm-eval's task guide, and its columns "
            "against the data."
        ) from error


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _task_manager(*, index: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=index)


def _local_task(path: Path) -> Task:
    """A task of our own from its YAML file, whose relative `data_files` lie beside it."""
    settings = _read_task_file(path)
    outward = [key for key in _OUTWARD_SETTINGS if key in settings]
    if outward or not isinstance(settings.get("task"), str):
        seen = f"has `{outward[0]}:`" if outward else "has no `task:` name"
        raise BenchmarkError(
            f"The benchmark task {path} {seen}. A task file must describe one task completely, "
            "under `task: NAME`; write all its settings out in the file."
        )
    _refuse_foreign_metrics(path, settings)
    parts = [hashlib.sha256(path.read_bytes()).hexdigest()]
    if settings.get("dataset_path") in _FILE_FORMATS:
        parts += [_sha256(file) for file in _anchor_data_files(path, settings)]
    return _checked(settings["task"], settings, parts, where=str(path))


def _read_task_file(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.constructor.ConstructorError as error:
        raise BenchmarkError(
            f"The benchmark task {path} is not plain data: {error.problem} (line {_line(error)}). "
            "Tags such as `!function` run Python code, which task files may not; use templates "
            "and lm-eval's own metrics instead."
        ) from error
    except yaml.YAMLError as error:
        raise BenchmarkError(
            f"The benchmark task {path} is not valid YAML: {' '.join(str(error).split())}. "
            "Correct the file."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(
            f"The benchmark task {path} cannot be read ({error}). Paths of task files are "
            "relative to the recipe's folder; to use a task that lm-eval has, give its name "
            "without .yaml."
        ) from error
    if not isinstance(settings, dict):
        raise BenchmarkError(
            f"The benchmark task {path} holds no settings. It must be a YAML mapping with `task`, "
            "`dataset_path`, `output_type` and so on; see lm-eval's task guide."
        )
    return settings


def _line(error: yaml.MarkedYAMLError) -> int | str:
    return error.problem_mark.line + 1 if error.problem_mark else "unknown"


def _refuse_foreign_metrics(path: Path, settings: Mapping[str, Any]) -> None:
    """lm-eval looks a metric it does not have up in `evaluate`, which downloads and runs code."""
    import lm_eval.api.metrics  # noqa: F401  (fills the registry)
    from lm_eval.api.registry import metric_registry

    for entry in settings.get("metric_list") or []:
        name = entry.get("metric") if isinstance(entry, dict) else entry
        if entry is name or entry.get("hf_evaluate") or name not in metric_registry:
            raise BenchmarkError(
                f"The benchmark task {path} asks for the metric {name!r}, which lm-eval "
                f"{version('lm_eval')} does not have itself. Use one of its own, as `- metric: "
                "acc` or `- metric: exact_match`."
            )


def _anchor_data_files(path: Path, settings: dict[str, Any]) -> list[Path]:
    """Make `data_files` absolute in place, and list them: lm-eval looks in the current folder."""
    found: list[Path] = []

    def anchored(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: anchored(item) for key, item in value.items()}
        if isinstance(value, list):
            return [anchored(item) for item in value]
        file = (path.parent / str(value)).resolve()
        if not file.is_file():
            raise BenchmarkError(
                f"The benchmark task {path} names the data file {value!r}, but there is no file "
                f"{file}. Paths in `data_files` are relative to the task's own folder; patterns "
                "and addresses are not read."
            )
        found.append(file)
        return str(file)

    kwargs = settings.get("dataset_kwargs")
    if isinstance(kwargs, dict) and "data_files" in kwargs:
        kwargs["data_files"] = anchored(kwargs["data_files"])
    return found


def _named_task(name: str, manager: Any) -> Task:
    """A task that lm-eval brings, by name; from then on it is loaded by path, without the index."""
    entry = manager.task_index.get(name)
    if entry is None:
        close = ", ".join(difflib.get_close_matches(name, manager.all_subtasks, n=5))
        raise BenchmarkError(
            f"lm-eval {version('lm_eval')} has no task named {name!r}; close to it are: "
            f"{close or 'none'}. `lm-eval ls tasks` lists all names; a task of your own is given "
            "as the path of its .yaml file."
        )
    config = entry.cfg or {}
    if name not in manager.all_subtasks:
        members = [member for member in entry.tags or config["task"] if isinstance(member, str)]
        raise BenchmarkError(
            f"{name!r} is a group of lm-eval tasks, and benchmarks are reported task by task. List "
            f"the ones you want by name; members are: {', '.join(sorted(members)[:5])}..."
        )
    return _checked(name, str(entry.yaml_path), [], where=str(config.get("dataset_path")))


def _checked(name: str, spec: str | dict[str, Any], parts: list[str], *, where: str) -> Task:
    """Load the task with its documents, and see that it can be run here and paired."""
    task = load(name, spec, where=where)
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        raise BenchmarkError(
            f"The benchmark task {name!r} runs code that the model wrote, or needs images or "
            "sound; neither is done here. Use lm-eval itself for it."
        )
    metric = _primary_metric(name, task.aggregation())
    if metric is None:
        raise BenchmarkError(
            f"No metric of the benchmark task {name!r} "
            f"({', '.join(task.aggregation()) or 'none listed'}) is a mean over documents, so "
            "base and edited cannot be paired on it. Choose a task with acc or exact_match."
        )
    identity = {"lm_eval": version("lm_eval"), "task": name, "files": parts}
    return Task(
        name=name,
        digest=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        metric=metric,
        higher_is_better=bool(task.higher_is_better().get(metric, True)),
        version=str(task.VERSION),
        documents=len(task.eval_docs),
        spec=spec,
    )


def _primary_metric(name: str, aggregations: Mapping[str, Callable[..., Any]]) -> str | None:
    """The metric that is reported (the room's docstring has the rule); None if none qualifies."""
    from lm_eval.api.metrics import mean

    means = [metric for metric, aggregate in aggregations.items() if aggregate is mean]
    first = ("acc_norm",) if name in LENGTH_NORMALISED else ()
    order = (*first, *PREFERRED_METRICS, *means)
    return next((metric for metric in order if metric in means), None)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
