"""Tasks that lm-eval brings: where their YAML lies, and what groups and tags stand for."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from abliterator.errors import BenchmarkError

_NAME = re.compile(
    r"""^["']?(?P<kind>task|group)["']?:[ ]*["']?(?P<name>[\w.-]+)["']?[ ]*(?:\#.*)?$""",
    re.MULTILINE,
)


class NamedTask(NamedTuple):
    """A task of lm-eval by the path of its YAML, and the group it was asked for in, if any."""

    name: str
    path: Path
    group: str | None


def named_tasks(name: str, *, group: str | None = None) -> list[NamedTask]:
    """What a name of lm-eval's stands for: one task, every task of a group, or of a tag.

    Tasks of a group are reported together, since the group has a score of its own; a tag is only a
    shorthand for several tasks.

    Raises:
        BenchmarkError: for a name that lm-eval does not have, and a group that changes its tasks.
    """
    kind, path = _index().get(name, ("", Path()))
    if kind == "task":
        return [NamedTask(name, path, group)]
    if kind == "group":
        members = _members(name, path)
        return [task for member in members for task in named_tasks(member, group=group or name)]
    return [task for member in _tagged(name) for task in named_tasks(member, group=group)]


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
    folder = Path(str(files("lm_eval"))) / "tasks"
    return (path for path in sorted(folder.rglob("*")) if path.suffix in {".yaml", ".yml"})


def _members(name: str, path: Path) -> list[str]:
    members = yaml_settings(path).get("task")
    if not isinstance(members, list) or not all(isinstance(m, str) for m in members):
        raise BenchmarkError(
            f"{name!r} is a group of lm-eval that changes the settings of its tasks, which is not "
            "done here. List the tasks you want by name; `lm-eval ls tasks` lists all names."
        )
    return members


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


def yaml_settings(path: Path) -> dict[str, Any]:
    """The settings in a task file of lm-eval's with what it includes; functions are not loaded."""
    from lm_eval.tasks._yaml_loader import load_yaml

    settings: dict[str, Any] = load_yaml(path, resolve_func=False)
    return settings
