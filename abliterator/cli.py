"""The command line: read, call, print.

Results go to stdout (`--json` for machines), bars and notes to stderr. Exit codes: 0 done, 1 an
error with a name, 2 usage, 130 interrupted. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from abliterator.errors import AbliteratorError

if TYPE_CHECKING:
    from abliterator.pipeline import Options, Plan
    from abliterator.recipe import Recipe
    from abliterator.record import Estimate, RunRecord


class Group(click.Group):
    """Turns named errors into one paragraph and exit code 1; all else keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except AbliteratorError as error:
            click.echo(f"{type(error).__name__}: {error}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("Interrupted. The same command goes on where this one stopped.", err=True)
            ctx.exit(130)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="abliterator")
@click.option("-v", "--verbose", is_flag=True, help="Show what the libraries log.")
def main(verbose: bool) -> None:
    """Remove the directions of one behaviour from a language model, and measure what that did."""
    if not verbose:
        logging.disable(logging.WARNING)


Command = Callable[..., None]


def recipe_arguments(command: Command) -> Command:
    """The arguments that every command on a recipe takes."""
    decorators = [
        click.argument("recipe", type=click.Path(exists=True, path_type=Path)),
        click.option(
            "--out", type=click.Path(path_type=Path), help="Output folder.  [default: out/RECIPE]"
        ),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Change one value of the recipe: --set k=3 --set prompts.target.path=FILE.",
        ),
        click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps."),
        click.option(
            "--dtype",
            type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
            default="auto",
            show_default=True,
            help="Dtype of computation; what is stored keeps its own.",
        ),
        click.option("--force", is_flag=True, help="Go on in a folder that another recipe made."),
    ]
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


@main.command()
@recipe_arguments
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
def build(recipe: Path, as_json: bool, **where: Any) -> None:
    """Run the whole pipeline: RECIPE becomes OUT/checkpoint, measured, with its card.

    RECIPE is a recipe file, or the folder of an earlier run.
    """
    from abliterator import pipeline

    read, out, options = _read(recipe, **where)
    record = pipeline.build(read, out, options=options, progress=Bars())
    click.echo(record.model_dump_json(indent=1) if as_json else _told(record, out))


def stage_command(stage: str, until: str, help_text: str) -> None:
    """Adds the command of one stage: it runs what the stage needs, then the stage."""

    @main.command(name=stage, help=help_text)
    @recipe_arguments
    def command(recipe: Path, **where: Any) -> None:
        from abliterator import pipeline

        read, out, options = _read(recipe, **where)
        pipeline.run_stages(read, out, until=until, options=options, progress=Bars())
        click.echo(out)


stage_command("directions", "directions", "Capture activations and find the subspace.")
stage_command("rollouts", "rollouts", "Let base and edited answer the evaluation prompts.")
stage_command("judge", "judge", "Judge the answers of base and edited.")
stage_command("benchmarks", "benchmarks", "Run lm-eval on base and edited.")
stage_command("card", "card", "Write record.json and the model card.")


@main.command()
@click.argument("recipe", required=False, type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Output folder.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="As for build.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Dtype of computation; what is stored keeps its own.",
)
@click.option("--force", is_flag=True, help="Go on in a folder that another recipe made.")
@click.option("--model", help="Without a recipe: Hub id or local folder.")
@click.option(
    "--subspace",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Without a recipe: safetensors file with a tensor `subspace` [d_model, k].",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was edited as JSON.")
def bake(
    recipe: Path | None, model: str | None, subspace: Path | None, as_json: bool, **where: Any
) -> None:
    """Write the edited checkpoint: of RECIPE, or of --model and --subspace into --out."""
    from abliterator import pipeline

    if recipe is None:
        edits = _bake_subspace(model, subspace, where)
        place = where["out"]
    else:
        if model or subspace:
            raise click.UsageError("--model and --subspace are given instead of a RECIPE.")
        read, out, options = _read(recipe, **where)
        pipeline.run_stages(read, out, until="bake", options=options, progress=Bars())
        place = out / "checkpoint"
        edits = json.loads((place / "abliterator" / "edits.json").read_text())
    click.echo(json.dumps(edits, indent=1) if as_json else f"{place}: {len(edits)} tensors edited")


def _bake_subspace(model: str | None, subspace: Path | None, where: dict[str, Any]) -> list[Any]:
    from abliterator import pipeline
    from abliterator.recipe import load_edit

    if not (model and subspace and where["out"]):
        raise click.UsageError("Give a RECIPE, or --model, --subspace and --out together.")
    edits = pipeline.bake_subspace(
        model, subspace, where["out"], edit=load_edit(where["overrides"])
    )
    return [edit.model_dump(mode="json") for edit in edits]


@main.command()
@click.argument("recipe_or_model")
@click.option("--out", type=click.Path(path_type=Path), default="out", help="Where it would go.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="As for build.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan(recipe_or_model: str, out: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Tell what a recipe, or the default edit of a model, would do; read headers only."""
    from abliterator import pipeline
    from abliterator.recipe import load_recipe

    path = Path(recipe_or_model)
    if path.suffix in {".yaml", ".yml"}:
        made = pipeline.plan_recipe(load_recipe(path, overrides=overrides), out)
    else:
        made = pipeline.plan_model(recipe_or_model, out)
    click.echo(json.dumps(made.summary(), indent=1) if as_json else _planned(made))


def _read(
    recipe: Path,
    *,
    out: Path | None,
    overrides: tuple[str, ...],
    device: str,
    dtype: str,
    force: bool,
) -> tuple[Recipe, Path, Options]:
    """The recipe of a file or of the folder of an earlier run, where it goes, and how it is run."""
    from abliterator.pipeline import Options, recipe_of
    from abliterator.recipe import load_recipe

    options = Options(device=device, dtype=dtype, force=force)
    if recipe.is_dir():
        if overrides or out:
            raise click.UsageError("The folder of an earlier run takes neither --set nor --out.")
        return recipe_of(recipe), recipe, options
    return load_recipe(recipe, overrides=overrides), out or Path("out") / recipe.stem, options


def _planned(plan: Plan) -> str:
    told = plan.summary()
    size = {name: f"{count / 1e9:.3f} GB" for name, count in told["bytes"].items()}
    edited = ", ".join(f"{n} {component}" for component, n in told["edited_tensors"].items())
    lines = [
        f"model        {told['model']} ({told['model_type']}, {told['n_layers']} layers, "
        f"d_model {told['d_model']})",
        *([f"layers       {told['layers']}, k = {told['k']}"] if told["k"] else []),
        f"edit         {edited or 'nothing'} tensors; {told['untouched_tensors']} stay as they are",
        f"bytes        read {size['read']}, edited {size['edited']}, written {size['written']}; "
        f"{size['free']} free",
        f"bake memory  {told['bake_memory'] / 1e6:.0f} MB",
        f"carried      {', '.join(told['files']['carried'])}",
        f"left out     {', '.join(told['files']['left_out']) or 'nothing'}",
    ]
    return "\n".join(lines)


def _told(record: RunRecord, out: Path) -> str:
    lines = [f"{out / 'checkpoint'}: {record.edit.tensors} tensors edited, k = {record.edit.k}"]
    if record.edit.max_leak is not None:
        lines[0] += f", leak at most {record.edit.max_leak:.1e}"
    rows = [["", "base", "edited", "delta"]]
    for name, behaviour in record.behaviour.items():
        for measure in ("refusal", "compliance", "coherence") if behaviour else ():
            sides = (getattr(behaviour, side) for side in ("base", "edited", "delta"))
            rows.append([f"{name} {measure}", *(_shown(getattr(s, measure)) for s in sides)])
    for task, result in record.benchmarks.items():
        estimates = (result.base, result.edited, result.delta)
        rows.append([f"{task} {result.metric}", *map(_shown, estimates)])
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines += ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    kl = record.divergence.kl_first_token if record.divergence else None
    lines.append(f"first-token KL on neutral prompts, nats: {_shown(kl)}")
    judged = record.judge.model or record.judge.kind if record.judge else "nobody"
    lines.append(f"judged by: {judged}")
    return "\n".join(line.rstrip() for line in lines)


def _shown(estimate: Estimate | None) -> str:
    if estimate is None:
        return "not measured"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.3f} (n={estimate.n})"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}] (n={estimate.n})"


class Bars:
    """Draws the pipeline's progress on stderr."""

    def stage(self, name: str, *, done: bool) -> None:
        """One line a stage."""
        click.echo(f"{name}{' (done before)' if done else ''}", err=True)

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """A tqdm bar that vanishes when it is full."""
        from tqdm import tqdm

        with tqdm(total=total, desc=f"  {label}", leave=False, file=sys.stderr) as bar:

            def advance(amount: int) -> None:
                bar.update(amount)

            yield advance

    def note(self, text: str) -> None:
        """A line of its own."""
        click.echo(text, err=True)
