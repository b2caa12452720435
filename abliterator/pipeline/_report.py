"""The stages that tell: record and card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from abliterator.checkpoint import write_text_atomic
from abliterator.errors import OutputError
from abliterator.pipeline._record import assemble
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Parts, Stage, save_value
from abliterator.record import RunRecord

MEASURED = (
    "prompts",
    "capture",
    "directions",
    "bake",
    "rollouts",
    "judge",
    "divergence",
    "benchmarks",
)


def _measured(run: Run) -> tuple[str, ...]:
    return (*MEASURED, "selection") if run.recipe.selects else MEASURED


def _record_inputs(run: Run) -> Any:
    return [{name: run.digest(name) for name in _measured(run)}, run.recipe.published()]


def _record(run: Run) -> tuple[list[Path], Parts]:
    import yaml

    out = run.workspace.checkpoint
    markers = {name: run.workspace.marker(name) for name in _measured(run)}
    timing = {name: marker.seconds for name, marker in markers.items() if marker is not None}
    path = save_value(out / "abliterator" / "record.json", assemble(run, timing))
    recipe = out / "recipe.yaml"
    plain = yaml.safe_dump(run.recipe.published(), sort_keys=False, allow_unicode=True)
    write_text_atomic(recipe, plain)
    return [path, recipe], {}


def _card_inputs(run: Run) -> Any:
    return run.digest("record")


def _card(run: Run) -> tuple[list[Path], Parts]:
    from abliterator.card import render_card

    path = run.workspace.checkpoint / "README.md"
    write_text_atomic(path, render_card(read_record(run.workspace.out)))
    return [path], {}


def read_record(out: Path) -> RunRecord:
    """The record of an output folder.

    Raises:
        OutputError: if there is none yet.
    """
    path = out / "checkpoint" / "abliterator" / "record.json"
    if not path.is_file():
        raise OutputError(f"{out} has no record yet; `abliterator build` makes it.")
    return RunRecord.model_validate_json(path.read_text())


RECORD = Stage("record", 1, _record_inputs, _record)
CARD = Stage("card", 1, _card_inputs, _card)
