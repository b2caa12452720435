"""Arguments that several commands share, and the values made from them."""

from __future__ import annotations

import difflib
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from abliterator.cli._terminal import QUIET, Bars, is_quiet
from abliterator.errors import OutputError
from abliterator.files import read_text

if TYPE_CHECKING:
    from abliterator.pipeline import Options
    from abliterator.recipe import JudgeSettings, Recipe
    from abliterator.source import ModelSource

VERBOSE = "abliterator.verbose"  # in the context of a command

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
NEW_FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


def together(*decorators: Decorator) -> Decorator:
    """One decorator that adds several arguments, in this order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change one value of the recipe: --set k=3 --set prompts.target.path=FILE.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class MemorySize(click.ParamType[int]):
    """A size such as 20GiB, as bytes; accelerate reads such too, but takes seconds to import."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The bytes of a size with its unit."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B", str(value), re.IGNORECASE)
        if match is None or not float(match[1]):
            self.fail(f"{value!r} is no size with a unit, such as 20GiB or 800MB.", param, ctx)
        base = 1024 if match[3] else 1000
        return int(float(match[1]) * base ** (1 + "KMGT".index(match[2].upper())))


class RecipePath(click.ParamType[Path]):
    """A recipe's file, the folder of an earlier run, or the name of a recipe of the package."""

    name = "recipe"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path of the file or folder."""
        return recipe_path(str(value)) or self.fail(_no_recipe(str(value)), param, ctx)


def recipe_path(text: str) -> Path | None:
    """The file, folder of an earlier run or recipe of the package that `text` names; None: none."""
    path = Path(text)
    if path.is_file() or (path / "work").is_dir():
        return path
    from abliterator.recipe import bundled_recipes

    return {recipe.name: recipe.path for recipe in bundled_recipes()}.get(text)


class RecipeOrModel(click.ParamType[Path | str]):
    """A recipe, as `RecipePath` takes it, as a path; everything else as the text of a model."""

    name = "recipe or model"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Path | str:
        """The path of a recipe, or the folder or id of a model as it was given."""
        path = Path(value)
        if path.suffix in {".yaml", ".yml"}:
            return path
        if (path / "config.json").is_file():
            return str(value)
        return recipe_path(str(value)) or str(value)


def _no_recipe(text: str) -> str:
    """Why a value is no recipe, and what to do."""
    from abliterator.recipe import bundled_recipes

    path, names = Path(text), [recipe.name for recipe in bundled_recipes()]
    is_yaml = path.suffix in {".yaml", ".yml"}
    if (path / "checkpoint").is_dir():
        return f"{text} has no folder `work`, so what it was made from is not known."
    is_hub_id = text.count("/") == 1 and not is_yaml and not text.startswith((".", "/", "~"))
    if (rooted := Path("/", text)) != path and (rooted / "config.json").is_file():
        path, text = rooted, str(rooted)  # the first slash was forgotten
    if (path / "config.json").is_file() or is_hub_id or text.startswith("embedded:"):
        return (
            f"{text} is a model, and a recipe was expected. Write one with `abliterator init "
            f"{text} --out first.yaml`, then give first.yaml."
        )
    if path.is_dir():
        return f"{text} is a folder, but not one that `abliterator build` made."
    close = difflib.get_close_matches(path.stem, names, n=1)
    hint = f"did you mean the recipe `{close[0]}` of the package? " if close else ""
    listing = "`abliterator recipes` lists those that come with the package."
    return f"There is no file {text}; {hint}{listing}"


def _set_quiet(context: click.Context, _: click.Parameter, value: bool) -> None:
    context.meta[QUIET] = context.meta.get(QUIET) or value


def _set_verbose(context: click.Context, _: click.Parameter, value: bool) -> None:
    context.meta[VERBOSE] = context.meta.get(VERBOSE) or value
    logging.disable(logging.NOTSET if context.meta[VERBOSE] else logging.WARNING)


verbosity = together(  # valid before and after the name of a command
    click.option(
        "-q",
        "--quiet",
        is_flag=True,
        expose_value=False,
        callback=_set_quiet,
        help="Print results and errors alone.",
    ),
    click.option(
        "-v",
        "--verbose",
        is_flag=True,
        expose_value=False,
        callback=_set_verbose,
        help="Show what the libraries log.",
    ),
)

computing_arguments = together(
    click.option(
        "--device",
        default="auto",
        show_default=True,
        help="cpu, cuda, cuda:1, mps, xpu; auto: one accelerator, and others, host memory and disk "
        "where the model needs them; balanced: all accelerators.",
    ),
    click.option(
        "--max-memory",
        type=MemorySize(),
        metavar="SIZE",
        help="Weights on each accelerator and in host memory at most: 20GiB.  [default: 85 % of "
        "what is free]",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        show_default=True,
        help="Dtype of computation; stored weights keep theirs.",
    ),
)

worker_arguments = together(
    click.option(
        "--workers",
        type=click.IntRange(min=1),
        metavar="N",
        help="Divide the work among N processes, each with the model: one an accelerator, or N "
        "that share the CPU's cores.  [default: one a GPU with --ray, else none]",
    ),
    click.option(
        "--ray",
        metavar="ADDRESS",
        help="Let workers of a Ray cluster do it: its address, or `auto` for the one that runs "
        "here or can be started here.",
    ),
)

judge_arguments = together(
    click.option(
        "--judge",
        "kind",
        type=click.Choice(["rules", "openai", "local"]),
        help="What grades the answers.  [default: the recipe's judge, else rules]",
    ),
    click.option(
        "--recipe",
        type=FILE,
        help="Use the `judge` section of this recipe.",
    ),
    SET,
)


VLLM_PYTHON = click.option(
    "--vllm-python",
    metavar="PYTHON",
    help="Interpreter that has vLLM, for `engine.kind: vllm`.  [default: the recipe's, else this]",
)
BASE = click.option(
    "--base", help="Folder or Hub id of the base.  [default: what OUT was built from]"
)


def read_judge(
    *, kind: str | None, recipe: Path | None, overrides: tuple[str, ...]
) -> JudgeSettings:
    """The judge settings that `judge_arguments` give."""
    from abliterator.recipe import load_judge, load_recipe

    if kind is not None:
        overrides = (f"judge.kind={kind}", *overrides)
    if recipe is not None:
        return load_recipe(recipe, overrides=overrides).judge
    return load_judge(overrides)


def recipe_model(recipe: Path | None) -> ModelSource | None:
    """The model of a recipe whose judge it is; None of any other judge, and without a recipe."""
    from abliterator.recipe import load_recipe
    from abliterator.source import resolve_folder

    if recipe is None or not (loaded := load_recipe(recipe)).judge.is_base:
        return None
    return resolve_folder(loaded.model, revision=loaded.revision)


def recipe_arguments(*, required: bool = True, several: bool = False) -> Decorator:
    """Adds RECIPE, --out, --set, --device and all else that a run needs to a command."""
    path = click.Path(path_type=Path)
    return together(
        click.argument(
            "recipes" if several else "recipe",
            required=required,
            nargs=-1 if several else 1,
            metavar="RECIPE..." if several else None,
            type=RecipePath(),
        ),
        click.option("--out", type=path, help="Output folder.  [default: out/RECIPE]"),
        SET,
        computing_arguments,
        worker_arguments,
        verbosity,
        click.option(
            "--force", is_flag=True, help="Continue in a folder that another recipe made."
        ),
        VLLM_PYTHON,
    )


def bars_of(recipe: Recipe, out: Path, options: Options, until: str = "card") -> Bars:
    """The progress of a build up to a stage; with its expected time where bars are drawn."""
    from abliterator.pipeline import expected_seconds, stages_of

    expected = None
    if sys.stderr.isatty() and not is_quiet():
        expected = expected_seconds(recipe, out, until=until, options=options)
    return Bars([stage.name for stage in stages_of(recipe, until)], expected=expected)


def read_recipe(
    recipe: Path,
    *,
    out: Path | None,
    overrides: tuple[str, ...],
    device: str,
    dtype: str,
    max_memory: int | None,
    force: bool,
    vllm_python: str | None,
    ray: str | None,
    workers: int | None,
) -> tuple[Recipe, Path, Options]:
    """The recipe (from a file, or the folder of an earlier run), the output folder, options."""
    from abliterator.pipeline import Options
    from abliterator.recipe import load_recipe

    options = Options(
        device, dtype, max_memory, force, vllm_python=vllm_python, ray=ray, workers=workers
    )
    if recipe.is_dir():
        if out:
            raise click.UsageError("The folder of an earlier run takes neither --set nor --out.")
        return run_recipe(recipe, overrides), recipe, options
    return load_recipe(recipe, overrides=overrides), out or Path("out") / recipe.stem, options


def run_recipe(out: Path, overrides: tuple[str, ...]) -> Recipe:
    """The recipe of an earlier run, which no `--set` changes."""
    from abliterator.pipeline import recipe_of

    if overrides:
        raise click.UsageError("The folder of an earlier run takes neither --set nor --out.")
    return recipe_of(out)


class BuildFolders(NamedTuple):
    """The folders and files that `verify` and `publish` read."""

    base: Path
    checkpoint: Path
    subspace: Path | None
    adapter: Path | None  # where it is, or would be; None beside a checkpoint alone


def checkpoint_folder(model: str) -> Path:
    """The checkpoint of a Hub id, a folder, or the folder of an earlier run."""
    from abliterator.source import resolve_folder

    if (Path(model) / "checkpoint" / "config.json").is_file():
        return Path(model) / "checkpoint"
    return resolve_folder(model, revision=None).folder


def build_folders(out: Path, base: str | None) -> BuildFolders:
    """The folders of a build, or of a checkpoint alone and its base."""
    from abliterator import pipeline
    from abliterator.record import RunRecord
    from abliterator.source import resolve_folder
    from abliterator.verification import EDITS, RECORD

    if (out / "work").is_dir():
        recipe = pipeline.recipe_of(out)
        source = resolve_folder(base or recipe.model, revision=None if base else recipe.revision)
        work = out / "work" / "directions.safetensors"
        return BuildFolders(source.folder, out / "checkpoint", work, out / "adapter")
    if not (out / EDITS).is_file():
        raise OutputError(
            f"{out} is neither the folder of a build nor a checkpoint that abliterator made."
        )
    record = out / RECORD
    recorded = RunRecord.model_validate_json(read_text(record)).model if record.is_file() else None
    if base is None and (recorded is None or recorded.revision is None):
        raise OutputError(f"{out} does not say where its base is: give it with --base.")
    model, revision = (recorded.id, recorded.revision) if recorded else ("", None)
    source = resolve_folder(base or model, revision=None if base else revision)
    return BuildFolders(source.folder, out, None, None)
