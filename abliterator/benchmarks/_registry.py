"""The tasks that lm-eval has: paths of their YAML files, and the tasks of groups and tags."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from abliterator.benchmarks._scores import Aggregate
from abliterator.errors import BenchmarkError

_NAME = re.compile(
    r"""^["']?(?P<kind>task|group)["']?:[ ]*["']?(?P<name>[\w.-]+)["']?[ ]*(?:\#.*)?$""",
    re.MULTILINE,
)
# The settings of a group itself; any other setting is one of its tasks.
_GROUP_SETTINGS = {"group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag"}
_OWN = Path(str(files("abliterator.benchmarks"))) / "groups"  # in lm-eval's format


class RegisteredTask(NamedTuple):
    """A task of lm-eval: the path of its YAML, and what the groups that name it add.

    `overrides` are settings that go before those of the file; `aggregates` are the groups' scores.
    """

    name: str
    path: Path
    overrides: dict[str, Any]
    aggregates: tuple[Aggregate, ...]


def registered_tasks(name: str) -> list[RegisteredTask]:
    """The tasks of a name: one task, or every task of a group or tag of lm-eval's, or of our own.

    Settings are inherited as in lm-eval's TaskFactory: the outer group's go before those of a
    group within it, and those of the line that names a member go before both.

    Raises:
        BenchmarkError: for a name that lm-eval does not have, and a group whose settings are code.
    """
    return _tasks_of(name, {}, ())


def _tasks_of(
    name: str, overrides: Mapping[str, Any], aggregates: tuple[Aggregate, ...]
) -> list[RegisteredTask]:
    """The tasks of a name, with what the groups around it pass on."""
    kind, path = _index().get(name, ("", Path()))
    if kind == "task":
        return [RegisteredTask(name, path, dict(overrides), aggregates)]
    if kind == "group":
        return _members(name, yaml_settings(path), overrides, aggregates)
    return [task for member in _tagged(name) for task in _tasks_of(member, overrides, aggregates)]


def _members(
    name: str,
    settings: Mapping[str, Any],
    overrides: Mapping[str, Any],
    aggregates: tuple[Aggregate, ...],
) -> list[RegisteredTask]:
    """The tasks of a group, which is in a file of its own or written into another group's."""
    aggregates = (*aggregates, *_aggregates(name, settings))
    outer = {**_task_settings(settings), **overrides}
    _refuse_code(name, outer)
    tasks = []
    for member in _as_list(settings.get("task")):
        if isinstance(member, str):
            tasks += _tasks_of(member, outer, aggregates)
        elif "group" not in member:
            inner = {**outer, **member}
            _refuse_code(name, inner)
            tasks += _tasks_of(inner.pop("task"), inner, aggregates)
        elif member["group"] in _index():
            tasks += _tasks_of(member["group"], {**outer, **_task_settings(member)}, aggregates)
        else:
            tasks += _members(f"{name}::{member['group']}", member, outer, aggregates)
    return tasks


def _task_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in _GROUP_SETTINGS}


def _aggregates(name: str, settings: Mapping[str, Any]) -> list[Aggregate]:
    """The scores of a group that are means, by lm-eval's configuration of groups."""
    from lm_eval.config.group import AggMetricConfig

    entries = [entry for entry in _as_list(settings.get("aggregate_metric_list")) if entry]
    # a score by a function of lm-eval's own is no mean over documents, and cannot be paired
    means = [entry for entry in entries if entry.get("aggregation", "mean") == "mean"]
    return [
        Aggregate(
            group=name,
            metric=config.metric,
            filters=tuple(config.filter_list) if config.filter_list else None,
            by_size=bool(config.weight_by_size),
        )
        for config in (AggMetricConfig(**entry) for entry in means)
    ]


def _as_list(value: Any) -> list[Any]:
    """The value as a list; lm-eval accepts a single item in place of a list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _refuse_code(name: str, overrides: Mapping[str, Any]) -> None:
    # functions are read as "<folder of the YAML>/<module>.<function>"
    if str(_folder()) in str(overrides):
        raise BenchmarkError(
            f"{name!r} is a group of lm-eval that gives its tasks functions of its own, which is "
            "not done here. List its tasks by name; `lm-eval ls tasks` lists all names."
        )


@cache
def _index() -> dict[str, tuple[str, Path]]:
    """Kind and file of every task and group, by a text search in 0.5 s; lm-eval's index takes 14.

    The names are in the files themselves, so there is no need to parse 14,000 of them.
    """
    index: dict[str, tuple[str, Path]] = {}
    paths = (*sorted(_OWN.iterdir()), *sorted(_folder().rglob("*")))
    for path in (path for path in paths if path.suffix in {".yaml", ".yml"}):
        kinds = {m["kind"]: m["name"] for m in _NAME.finditer(path.read_text(encoding="utf-8"))}
        # an old-style task may name its group too
        kind = "task" if "task" in kinds else "group"
        if kind in kinds:
            index.setdefault(kinds[kind], (kind, path))
    return index


@cache
def _folder() -> Path:
    return Path(str(files("lm_eval"))) / "tasks"


def _tagged(name: str) -> Sequence[str]:
    """The tasks of a tag, by lm-eval's own index."""
    manager = _manager()
    entry = manager.task_index.get(name)
    if entry is None or not entry.tags:
        close = ", ".join(difflib.get_close_matches(name, manager.all_tasks, n=5))
        raise BenchmarkError(
            f"lm-eval {version('lm_eval')} has no task named {name!r}; close to it are: "
            f"{close or 'none'}. `lm-eval ls tasks` lists all names; a task of your own is given "
            "as the path of its .yaml file."
        )
    return sorted(entry.tags)


@cache
def _manager() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def yaml_settings(path: Path, *, functions: bool = False) -> dict[str, Any]:
    """The settings in a task file of lm-eval's with those of the files that it includes.

    Where `functions` are not wanted, each is "<folder>/<module>.<function>" and no code is run.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    settings: dict[str, Any] = load_yaml(path, resolve_func=functions)
    return settings
