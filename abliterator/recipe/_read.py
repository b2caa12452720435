"""Reading a recipe: safe yaml, overrides, and one report of everything that is wrong with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from abliterator.errors import RecipeError
from abliterator.recipe._benchmarks import is_task_file
from abliterator.recipe._edit import Edit
from abliterator.recipe._judge import JudgeSettings
from abliterator.recipe._pairs import PairsSpec
from abliterator.recipe._prompts import Source
from abliterator.recipe._recipe import Recipe

Path_ = tuple[str | int, ...]
MAX_BYTES = 1 << 20


def load_recipe(path: Path, *, overrides: Sequence[str] = ()) -> Recipe:
    """Reads, overrides and validates a recipe.

    Args:
        path: the yaml file. Paths in it are relative to its folder.
        overrides: `key.sub=value`, a yaml value. Paths in them are relative to the working folder.

    Returns:
        The recipe; every local path in it is absolute.

    Raises:
        RecipeError: everything that is wrong, together, each with its path and line.
    """
    return _load(Recipe, path, overrides)


def load_pairs(path: Path, *, overrides: Sequence[str] = ()) -> PairsSpec:
    """Reads, overrides and validates what contrast pairs are to be made.

    Args:
        path: the yaml file. A local tokenizer in it is relative to its folder.
        overrides: `key.sub=value`, a yaml value.

    Raises:
        RecipeError: everything that is wrong, together, each with its path and line.
    """
    return _load(PairsSpec, path, overrides)


T = TypeVar("T", bound=BaseModel)


def _load(kind: type[T], path: Path, overrides: Sequence[str]) -> T:
    text = _read_text(path)
    root, values = _parse(text, path)
    lines = dict(_lines(root))
    problems = [
        f"line {line}: `{_dotted(where)}` is given twice" for where, line in _duplicates(root)
    ]
    if values is not None and not isinstance(values, dict):
        raise RecipeError(f"{path.name} is not a recipe: it must be a mapping of keys to values.")
    values = values or {}
    _anchor_paths(values, path.resolve().parent)
    for override in overrides:
        _apply(values, override)
    read, invalid = _validated(kind, values, lines)
    problems += invalid
    if read is None or problems:
        raise RecipeError(f"{path.name} has {_count(problems)}:\n  " + "\n  ".join(problems))
    return read


def load_edit(overrides: Sequence[str]) -> Edit:
    """The `edit` section alone, from defaults and overrides of the form `edit.key=value`.

    Raises:
        RecipeError: everything that is wrong, together.
    """
    return _load_section(Edit, "edit", overrides)


def load_judge(overrides: Sequence[str]) -> JudgeSettings:
    """The `judge` section alone, from defaults and overrides of the form `judge.key=value`.

    Raises:
        RecipeError: everything that is wrong, together.
    """
    return _load_section(JudgeSettings, "judge", overrides)


def _load_section(kind: type[T], name: str, overrides: Sequence[str]) -> T:
    values: dict[str, Any] = {}
    for override in overrides:
        if not override.startswith(f"{name}."):
            raise RecipeError(
                f"Only `{name}` can be set here, as `--set {name}.KEY=VALUE`: {override}"
            )
        _apply(values, override)
    section, problems = _validated(kind, values.get(name, {}), {})
    if section is None:
        raise RecipeError(f"`{name}` has {_count(problems)}:\n  " + "\n  ".join(problems))
    return section


def _validated(kind: type[T], values: Any, lines: dict[Path_, int]) -> tuple[T | None, list[str]]:
    try:
        return kind.model_validate(values), []
    except ValidationError as error:
        return None, list(_describe(error.errors(), lines))


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"Cannot read the recipe {path}: {error.strerror}.") from error
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{path} is over 1 MiB: that is no recipe.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text (byte {error.start}).") from error


def _parse(text: str, path: Path) -> tuple[yaml.Node | None, Any]:
    """The yaml tree, which knows its lines and its duplicates, and the values."""
    try:
        # an alias can make a small file huge when it is walked, and no recipe needs one
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise RecipeError(f"{path.name} uses a yaml alias (`*name`); write the value out.")
        return yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except RecursionError:
        raise RecipeError(f"{path.name} is nested too deeply to be a recipe.") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        what = " ".join(str(error).split())
        raise RecipeError(f"{path.name} is not valid yaml: {what}") from error


def _pairs(node: yaml.Node | None, where: Path_ = ()) -> Iterator[tuple[Path_, yaml.Node]]:
    """Every key of a yaml tree with its path, duplicates included."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*where, str(key.value))
            yield here, key
            yield from _pairs(value, here)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield (*where, i), value
            yield from _pairs(value, (*where, i))


def _lines(root: yaml.Node | None) -> Iterator[tuple[Path_, int]]:
    for where, node in _pairs(root):
        yield where, node.start_mark.line + 1


def _duplicates(root: yaml.Node | None) -> Iterator[tuple[Path_, int]]:
    seen: set[Path_] = set()
    for where, line in _lines(root):
        if where in seen:
            yield where, line
        seen.add(where)


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(f"--set takes key=value, as in `--set k=3`; it got `{override}`.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {key}: the value is not valid yaml: {text}") from error
    here = values
    for part in parts[:-1]:
        inner = here.get(part)
        here[part] = here = dict(inner) if isinstance(inner, dict) else {}
    if parts[-1] in {"path", "dataset"}:  # another origin: what belonged to the old one goes
        for stale in set(Source.model_fields) - {"limit"}:
            here.pop(stale, None)
    here[parts[-1]] = value
    branch: dict[str, Any] = {parts[-1]: value}
    for part in reversed(parts[:-1]):
        branch = {part: branch}
    _anchor_paths(branch, Path.cwd())
    here[parts[-1]] = _at(branch, parts)


def _at(branch: Any, parts: Sequence[str]) -> Any:
    for part in parts:
        branch = branch[part]
    return branch


def _anchor_paths(values: dict[str, Any], folder: Path) -> None:
    """Makes the local paths of a raw recipe absolute, in place; what is no path stays as it is."""
    for key in ("model", "tokenizer"):
        model = values.get(key)
        if isinstance(model, str) and _is_local(model, folder):
            values[key] = _anchored(model, folder)
    prompts = values.get("prompts")
    for source in prompts.values() if isinstance(prompts, dict) else ():
        if isinstance(source, dict) and isinstance(source.get("path"), str):
            source["path"] = _anchored(source["path"], folder)
    judge = values.get("judge")
    if isinstance(judge, dict) and isinstance(judge.get("calibration"), str):
        judge["calibration"] = _anchored(judge["calibration"], folder)
    benchmarks = values.get("benchmarks")
    tasks = benchmarks.get("tasks") if isinstance(benchmarks, dict) else None
    if isinstance(benchmarks, dict) and isinstance(tasks, list):
        benchmarks["tasks"] = [_anchored_task(task, folder) for task in tasks]


def _anchored_task(task: Any, folder: Path) -> Any:
    if isinstance(task, dict) and "task" in task:
        return {**task, "task": _anchored_task(task["task"], folder)}
    return _anchored(task, folder) if isinstance(task, str) and is_task_file(task) else task


def _is_local(model: str, folder: Path) -> bool:
    if model.startswith((".", "/", "~")):
        return True
    return bool(model) and ":" not in model and (folder / model).is_dir()


def _anchored(path: str, folder: Path) -> str:
    return str((folder / Path(path).expanduser()).resolve())


def _describe(found: Sequence[Any], lines: dict[Path_, int]) -> Iterator[str]:
    """One sentence for each place that pydantic complains of; branches of a union are joined."""
    complaints: dict[Path_, list[str]] = {}
    shown: dict[Path_, str] = {}
    for problem in found:
        where = _without_branches(tuple(problem["loc"]))
        complaints.setdefault(where, []).append(_complaint(problem, where))
        shown[where] = _shown(problem)
    for where, whats in complaints.items():
        if any(other[: len(where)] == where != other for other in complaints):
            continue  # a part of it is wrong, and that says more
        line = next(
            (lines[where[:n]] for n in range(len(where), 0, -1) if where[:n] in lines), None
        )
        at = f"line {line}: " if line is not None else ""
        what = " or ".join([whats[0], *(other.removeprefix("must be ") for other in whats[1:])])
        yield at + (f"`{_dotted(where)}` " if where else "") + what + shown[where]


def _complaint(problem: Any, where: Path_) -> str:
    if problem["type"] == "extra_forbidden":
        return "is not a key of the recipe" + _suggestion(where)
    if problem["type"] == "missing":
        return "is missing"
    if problem["type"] in {"model_type", "model_attributes_type", "dict_type"}:
        return "must be a mapping of keys to values"
    what: str = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return what.replace("a valid tuple", "a list")


def _shown(problem: Any) -> str:
    value = problem["input"]
    plain = isinstance(value, (str, int, float, bool, type(None)))
    # "secret": what stands there may be a key, or hold a password
    if problem["type"] in {"extra_forbidden", "missing", "secret"} or not plain:
        return ""
    text = repr(value)
    return f", not {text if len(text) <= 60 else text[:57] + '...'}"


def _without_branches(loc: Path_) -> Path_:
    """A pydantic location without the names of union branches, which no recipe contains."""
    branches = {"int", "str", "float", "bool", "constrained-int", "constrained-float"}
    return tuple(
        part
        for i, part in enumerate(loc)
        if isinstance(part, int) or i == 0 or not (part in branches or set(part) & set("[(' "))
    )


def _suggestion(where: Path_) -> str:
    close = difflib.get_close_matches(str(where[-1]), list(_all_fields(Recipe)), n=1)
    return f" (did you mean `{close[0]}`?)" if close else ""


def _all_fields(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _all_fields(field.annotation)


def _dotted(where: Path_) -> str:
    return ".".join(map(str, where))


def _count(problems: Sequence[str]) -> str:
    return "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
