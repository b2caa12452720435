"""Tasks that lm-eval brings: where their YAML lies, and what groups and tags stand for."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
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


# What a group says of itself; anything else that it says, it says of its tasks.
_GROUP_SETTINGS = {"group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag"}


class NamedTask(NamedTuple):
    """A task of lm-eval: the path of its YAML, and what the groups it was asked for in add.

    `overrides` are settings that go before those of the file; `aggregates` are the groups' scores.
    """

    name: str
    path: Path
    overrides: dict[str, Any]
    aggregates: tuple[Aggregate, ...]


class _Wider(NamedTuple):
    """What the groups around a member of a group hand down to it."""

    overrides: Mapping[str, Any] = {}
    aggregates: tuple[Aggregate, ...] = ()


def named_tasks(name: str) -> list[NamedTask]:
    """What a name of lm-eval's stands for: one task, every task of a group, or of a tag.

    Settings are handed down as by lm-eval's TaskFactory: the wider group's go before those of a
    group within it, and those of the line that names a member go before both.

    Raises:
        BenchmarkError: for a name that lm-eval does not have, and a group whose settings are code.
    """
    return _named(name, _Wider())


def _named(name: str, wider: _Wider) -> list[NamedTask]:
    kind, path = _index().get(name, ("", Path()))
    if kind == "task":
        return [NamedTask(name, path, dict(wider.overrides), wider.aggregates)]
    if kind == "group":
        return _members(name, yaml_settings(path), wider)
    return [task for member in _tagged(name) for task in _named(member, wider)]


def _members(name: str, settings: Mapping[str, Any], wider: _Wider) -> list[NamedTask]:
    """The tasks of a group, which is in a file of its own or written into another group's."""
    own = {key: value for key, value in settings.items() if key not in _GROUP_SETTINGS}
    inner = _Wider({**own, **wider.overrides}, (*wider.aggregates, *_aggregates(name, settings)))
    _refuse_code(name, inner.overrides)
    found = []
    for member in _listed(settings.get("task")):
        if isinstance(member, str):
            found += _named(member, inner)
        elif "group" not in member:
            overrides = {**inner.overrides, **member}
            _refuse_code(name, overrides)
            found += _named(overrides.pop("task"), inner._replace(overrides=overrides))
        elif member["group"] in _index():
            said = {key: value for key, value in member.items() if key not in _GROUP_SETTINGS}
            overrides = {**inner.overrides, **said}
            found += _named(member["group"], inner._replace(overrides=overrides))
        else:
            found += _members(f"{name}::{member['group']}", member, inner)
    return found


def _aggregates(name: str, settings: Mapping[str, Any]) -> list[Aggregate]:
    entries = [entry for entry in _listed(settings.get("aggregate_metric_list")) if entry]
    return [
        Aggregate(
            group=name,
            metric=entry["metric"],
            filters=tuple(_listed(entry["filter_list"])) if entry.get("filter_list") else None,
            by_size=bool(entry.get("weight_by_size", True)),
        )
        for entry in entries
    ]


def _listed(value: Any) -> list[Any]:
    """lm-eval takes one thing where it takes a list of them."""
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
    """Kind and file of every task and group, found by text: 0.5 s where lm-eval's index takes 14.

    The names are in the files themselves, so there is no need to parse 14,000 of them.
    """
    found: dict[str, tuple[str, Path]] = {}
    for path in _yaml_files():
        kinds = {m["kind"]: m["name"] for m in _NAME.finditer(path.read_text(encoding="utf-8"))}
        # an old-style task may name its group too
        kind = "task" if "task" in kinds else "group"
        if kind in kinds:
            found.setdefault(kinds[kind], (kind, path))
    return found


def _yaml_files() -> Iterator[Path]:
    return (path for path in sorted(_folder().rglob("*")) if path.suffix in {".yaml", ".yml"})


@cache
def _folder() -> Path:
    return Path(str(files("lm_eval"))) / "tasks"


def _tagged(name: str) -> Sequence[str]:
    """The tasks of a tag, by lm-eval's own index."""
    manager = _manager()
    entry = manager.task_index.get(name)
    if entry is None or not entry.tags:
        known = manager.all_tasks
        close = ", ".join(difflib.get_close_matches(name, known, n=5))
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
    """The settings in a task file of lm-eval's with what it includes.

    Where `functions` are not wanted, each is "<folder>/<module>.<function>" and no code is run.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    settings: dict[str, Any] = load_yaml(path, resolve_func=functions)
    return settings
