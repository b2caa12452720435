"""Local tasks: a YAML file that is data, not code."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from abliterator.errors import BenchmarkError, FileError
from abliterator.files import read_text, sha256_of_file

# `datasets` reads these from files; any other dataset_path is the id of a dataset on the Hub.
FILE_FORMATS = frozenset({"arrow", "csv", "json", "parquet", "text"})
_MAX_BYTES = 16 << 20  # of a task file
# Settings by which a task file includes other files, of which some may hold code.
_OUTWARD_SETTINGS = ("include", "group", "use_prompt")


def local_task(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Reads a local task from its YAML file; relative `data_files` lie beside it.

    Returns:
        Its settings, and the SHA-256 of the file and of each of its data files.

    Raises:
        BenchmarkError: if the file is not one plain task, or names data files that are not there.
    """
    settings = _read_task_file(path)
    outward = [key for key in _OUTWARD_SETTINGS if key in settings]
    if outward or not isinstance(settings.get("task"), str):
        problem = f"has `{outward[0]}:`" if outward else "has no `task:` name"
        raise BenchmarkError(
            f"The benchmark task {path} {problem}. A task file must describe one task completely, "
            "under `task: NAME`; write all its settings out in the file."
        )
    _refuse_foreign_metrics(path, settings)
    hashes = [sha256_of_file(path)]
    if settings.get("dataset_path") in FILE_FORMATS:
        hashes += [sha256_of_file(file) for file in _anchor_data_files(path, settings)]
    return settings, hashes


def _read_task_file(path: Path) -> dict[str, Any]:
    try:
        text = read_text(path, max_bytes=_MAX_BYTES)
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            problem = (
                "uses a YAML alias (`*name`), of which a few lines make gigabytes. Write the value "
                "out."
            )
        elif isinstance(settings := yaml.safe_load(text), dict):
            return settings
        else:
            problem = (
                "holds no settings. It must be a YAML mapping with `task`, `dataset_path`, "
                "`output_type` and so on; see lm-eval's task guide."
            )
    except yaml.constructor.ConstructorError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "unknown"
        problem = (
            f"is not plain data: {error.problem} (line {line}). Tags such as `!function` run "
            "Python code, which task files may not; use templates and metrics of lm-eval's instead."
        )
    except yaml.YAMLError as error:
        problem = f"is not valid YAML: {' '.join(str(error).split())}. Correct the file."
    except (ValueError, RecursionError) as error:  # a date that is none, nesting without end
        problem = f"cannot be read as YAML ({error}). Correct the file."
    except FileError as error:
        problem = (
            f"cannot be read ({error}). Paths of task files are relative to the recipe's folder; "
            "to use a task that lm-eval has, give its name without .yaml."
        )
    raise BenchmarkError(f"The benchmark task {path} {problem}")


def _refuse_foreign_metrics(path: Path, settings: Mapping[str, Any]) -> None:
    """Raises BenchmarkError for a metric that is not lm-eval's own.

    lm-eval would load it by `evaluate`, which downloads and runs code.
    """
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
    """Makes `data_files` absolute in place, and lists them; lm-eval reads in the current folder."""
    paths: list[Path] = []

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
        paths.append(file)
        return str(file)

    kwargs = settings.get("dataset_kwargs")
    if isinstance(kwargs, dict) and "data_files" in kwargs:
        kwargs["data_files"] = anchored(kwargs["data_files"])
    return paths
