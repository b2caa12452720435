"""Reads recipes from safe yaml with overrides, and reports all faults at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from abliterator.errors import FileError, RecipeError
from abliterator.files import read_text
from abliterator.recipe._benchmarks import is_task_file
from abliterator.recipe._bundled import EMBEDDED, bundled_folder
from abliterator.recipe._edit import Edit
from abliterator.recipe._engine import EngineSettings
from abliterator.recipe._judge import BASE, JudgeSettings
from abliterator.recipe._pairs import PairsSpec
from abliterator.recipe._prompts import Source
from abliterator.recipe._recipe import Recipe
from abliterator.recipe._yaml import (
    Plain,
    Where,
    YamlError,
    dotted,
    duplicates,
    no_texts,
    pairs,
    parse,
    parse_typed,
    resolve,
)

MAX_BYTES = 1 << 20


def load_recipe(path: str | Path, *, overrides: Sequence[str] = ()) -> Recipe:
    """Reads, overrides and validates a recipe.

    Args:
        path: the yaml file. Paths in it are relative to its folder.
        overrides: `key.sub=value`; the value is read literally, or as yaml where it begins with a
            bracket or a quote. Paths in them are relative to the working folder.

    Returns:
        The recipe; every local path in it is absolute.

    Raises:
        RecipeError: with every fault, each with its path and line.
    """
    return _load(Recipe, Path(path), overrides)


def load_pairs(path: Path, *, overrides: Sequence[str] = ()) -> PairsSpec:
    """Reads, overrides and validates a specification of contrast pairs.

    Args:
        path: the yaml file. A local tokenizer in it is relative to its folder.
        overrides: as for `load_recipe`.

    Raises:
        RecipeError: with every fault, each with its path and line.
    """
    return _load(PairsSpec, path, overrides)


T = TypeVar("T", bound=BaseModel)


def _load(kind: type[T], path: Path, overrides: Sequence[str]) -> T:
    try:
        root, values = parse(_read_text(path))
    except YamlError as error:
        raise RecipeError(f"{path.name} cannot be read as a recipe: {error}.") from error
    lines = {where: node.start_mark.line + 1 for where, node in pairs(root)}
    problems = [
        f"line {line}: `{dotted(where)}` is given twice" for where, line in duplicates(root)
    ]
    if values is not None and not isinstance(values, dict):
        raise RecipeError(f"{path.name} is not a recipe: it must be a mapping of keys to values.")
    values = values or {}
    _anchor_paths(values, path.resolve().parent)
    for override in overrides:
        _apply(values, override)
    loaded, invalid = _validated(kind, values, lines)
    problems += invalid
    if loaded is None or problems:
        raise RecipeError(f"{path.name} has {_count(problems)}:\n  " + "\n  ".join(problems))
    return loaded


def load_edit(overrides: Sequence[str]) -> Edit:
    """The `edit` section alone, from defaults and overrides of the form `edit.key=value`.

    Raises:
        RecipeError: with every fault.
    """
    return _load_section(Edit, "edit", overrides)


def load_judge(overrides: Sequence[str]) -> JudgeSettings:
    """The `judge` section alone, from defaults and overrides of the form `judge.key=value`.

    Raises:
        RecipeError: with every fault.
    """
    return _load_section(JudgeSettings, "judge", overrides)


def load_engine(overrides: Sequence[str]) -> EngineSettings:
    """The `engine` section alone, from defaults and overrides of the form `engine.key=value`.

    Raises:
        RecipeError: with every fault.
    """
    return _load_section(EngineSettings, "engine", overrides)


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


def _validated(kind: type[T], values: Any, lines: dict[Where, int]) -> tuple[T | None, list[str]]:
    values, undecided = resolve(kind, values)
    problems = [
        f"`{dotted(where)}` holds what is no text: a NUL, or bytes that are not UTF-8"
        for where in no_texts(values)
    ]
    if problems:
        return None, problems
    try:
        return kind.model_validate(values), undecided
    except ValidationError as error:
        return None, list(_describe(error.errors(), lines))


def _read_text(path: Path) -> str:
    try:
        return read_text(path, max_bytes=MAX_BYTES)
    except FileError as error:
        raise RecipeError(f"Cannot read the recipe. {error}") from error


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(f"--set takes key=value, as in `--set k=3`; it got `{override}`.")
    try:
        value = parse_typed(text)
    except YamlError as error:
        raise RecipeError(f"--set {key}: {error}: {text}") from error
    section = values
    for part in parts[:-1]:
        inner = section.get(part)
        if not isinstance(inner, (dict, NoneType)):
            raise RecipeError(
                f"--set {key}: the recipe gives `{part}` one value, without keys, which would be "
                f"lost. Set all of `{part}`, as in `--set '{part}={{KEY: VALUE}}'`."
            )
        section[part] = section = dict(inner or {})
    if parts[-1] in {"path", "dataset"}:  # another origin: settings of the old one are removed
        for field in set(Source.model_fields) - {"limit"}:
            section.pop(field, None)
    leaf = branch = {parts[-1]: value}
    for part in reversed(parts[:-1]):
        branch = {part: branch}
    _anchor_paths(branch, Path.cwd())
    section.update(leaf)


def _anchor_paths(values: dict[str, Any], folder: Path) -> None:
    """Makes the local paths of a raw recipe absolute, in place; other values stay."""
    for key in ("model", "tokenizer"):
        model = _text_of(values.get(key))
        if isinstance(model, str) and _is_local(model, folder):
            values[key] = _anchored(model, folder)
    prompts = values.get("prompts")
    by_name = prompts if isinstance(prompts, dict) else {}
    protected = by_name.get("protect")
    for source in (*by_name.values(), *(protected.values() if isinstance(protected, dict) else ())):
        if isinstance(source, dict) and isinstance(path := _text_of(source.get("path")), str):
            source["path"] = _anchored(path, folder)
    judge = values.get("judge")
    if isinstance(judge, dict) and isinstance(file := _text_of(judge.get("calibration")), str):
        judge["calibration"] = _anchored(file, folder)
    if isinstance(judge, dict) and isinstance(model := _text_of(judge.get("model")), str):
        # an override has no kind beside it, and no server's model is called like a path
        is_path = model.startswith(("./", "../", "/", "~/"))
        names_folder = judge.get("kind") == "local" and model != BASE and _is_local(model, folder)
        if is_path or names_folder:
            judge["model"] = _anchored(model, folder)
    engine = values.get("engine")
    if isinstance(engine, dict) and isinstance(python := _text_of(engine.get("python")), str):
        engine["python"] = _anchored_command(python, folder)
    benchmarks = values.get("benchmarks")
    tasks = benchmarks.get("tasks") if isinstance(benchmarks, dict) else None
    if isinstance(benchmarks, dict) and isinstance(tasks, list):
        benchmarks["tasks"] = [_anchored_task(task, folder) for task in tasks]


def _text_of(value: Any) -> Any:
    """The characters of a scalar whose key is a text: a folder may be called 2024 or no."""
    return value.text if isinstance(value, Plain) else value


def _anchored_task(task: Any, folder: Path) -> Any:
    if isinstance(task, dict) and "task" in task:
        return {**task, "task": _anchored_task(task["task"], folder)}
    return _anchored(task, folder) if isinstance(task, str) and is_task_file(task) else task


def _is_local(model: str, folder: Path) -> bool:
    if model.startswith((".", "/", "~")):
        return True
    try:
        return bool(model) and ":" not in model and (folder / model).is_dir()
    except OSError:  # a name that is too long for a folder's
        return False


def _anchored(path: str, folder: Path) -> str:
    if path.startswith(EMBEDDED):
        folder, path = bundled_folder(), path.removeprefix(EMBEDDED)
    try:
        return str((folder / Path(path).expanduser()).resolve())
    except (OSError, RuntimeError, ValueError):  # a NUL, or an unknown user: refused when read
        return path


def _anchored_command(command: str, folder: Path) -> str:
    """A command's path made absolute; a bare name is left to the search path.

    Links stay: the interpreter of an environment is one, and its target is another environment.
    """
    if "/" not in command and "\\" not in command:
        return command
    try:
        return str(folder / Path(command).expanduser())
    except (RuntimeError, ValueError):
        return command


def _describe(errors: Sequence[Any], lines: dict[Where, int]) -> Iterator[str]:
    """One sentence for each location of pydantic's errors; branches of a union are joined."""
    complaints: dict[Where, list[str]] = {}
    excerpts: dict[Where, str] = {}
    for problem in errors:
        where = _without_branches(tuple(problem["loc"]))
        complaints.setdefault(where, []).append(_complaint(problem, where))
        excerpts[where] = _excerpt(problem)
    for where, descriptions in complaints.items():
        if any(other[: len(where)] == where != other for other in complaints):
            continue  # errors of its parts are more specific
        line = next(
            (lines[where[:n]] for n in range(len(where), 0, -1) if where[:n] in lines), None
        )
        position = f"line {line}: " if line is not None else ""
        description = " or ".join(
            [descriptions[0], *(other.removeprefix("must be ") for other in descriptions[1:])]
        )
        yield position + (f"`{dotted(where)}` " if where else "") + description + excerpts[where]


def _complaint(problem: Any, where: Where) -> str:
    if problem["type"] == "extra_forbidden":
        return "is not a key of the recipe" + _suggestion(where)
    if problem["type"] == "missing":
        return "is missing"
    if problem["type"] in {"model_type", "model_attributes_type", "dict_type"}:
        return "must be a mapping of keys to values"
    message: str = (
        problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    )
    return message.replace("a valid tuple", "a list")


def _excerpt(problem: Any) -> str:
    value = problem["input"]
    plain = isinstance(value, (str, int, float, bool, type(None)))
    # "secret": the value may be a key, or contain a password
    if problem["type"] in {"extra_forbidden", "missing", "secret"} or not plain:
        return ""
    text = repr(value)
    return f", not {text if len(text) <= 60 else text[:57] + '...'}"


def _without_branches(loc: Where) -> Where:
    """A pydantic location without the names of union branches, which no recipe contains."""
    branches = {"int", "str", "float", "bool", "constrained-int", "constrained-float"}
    return tuple(
        part
        for i, part in enumerate(loc)
        if isinstance(part, int) or i == 0 or not (part in branches or set(part) & set("[(' "))
    )


def _suggestion(where: Where) -> str:
    close = difflib.get_close_matches(str(where[-1]), list(_all_fields(Recipe)), n=1)
    return f" (did you mean `{close[0]}`?)" if close else ""


def _all_fields(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _all_fields(field.annotation)


def _count(problems: Sequence[str]) -> str:
    return "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
