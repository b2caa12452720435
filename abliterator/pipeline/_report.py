"""The stages that tell: record and card."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

from abliterator.errors import OutputError
from abliterator.files import copy_file, read_text, write_text_atomic
from abliterator.pipeline._record import assemble
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Parts, Stage, save_value
from abliterator.recipe import to_yaml
from abliterator.record import RunRecord
from abliterator.verification import PICTURES

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
    recipe = run.recipe
    asked = {"selection": recipe.selects, "tuning": recipe.tunes, "adapter": recipe.edit.adapts}
    return (*MEASURED, *(name for name, wanted in asked.items() if wanted))


def _record_inputs(run: Run) -> Any:
    return [{name: run.digest(name) for name in _measured(run)}, run.recipe.published()]


def _record(run: Run) -> tuple[list[Path], Parts]:
    out = run.workspace.checkpoint
    markers = {name: run.workspace.marker(name) for name in _measured(run)}
    timing = {name: marker.seconds for name, marker in markers.items() if marker is not None}
    pictures = _pictures(run)
    hashes = {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in pictures.items()
    }
    path = save_value(out / "abliterator" / "record.json", assemble(run, timing, hashes))
    recipe = out / "recipe.yaml"
    write_text_atomic(recipe, to_yaml(run.recipe.published()))
    return [path, recipe, *pictures.values()], {}


def _pictures(run: Run) -> dict[str, Path]:
    """The selection's pictures, copied beside the record; those of an earlier run are removed."""
    marker = run.workspace.marker("selection") if run.recipe.selects else None
    drawn = (
        {Path(path).name: run.workspace.out / path for path in marker.artefacts} if marker else {}
    )
    copied = {}
    for name in PICTURES:
        source, place = drawn.get(Path(name).name), run.workspace.checkpoint / name
        if source is None:
            place.unlink(missing_ok=True)
        else:
            copy_file(source, place)
            copied[name] = place
    return copied


def _card_inputs(run: Run) -> Any:
    return run.digest("record")


def _card(run: Run) -> tuple[list[Path], Parts]:
    from abliterator.card import render_adapter_card, render_card

    record = read_record(run.workspace.out)
    cards = {run.workspace.checkpoint / "README.md": render_card(record)}
    if run.recipe.edit.adapts:
        cards[run.workspace.adapter / "README.md"] = render_adapter_card(record)
    elif run.workspace.marker("adapter") is not None:
        shutil.rmtree(run.workspace.adapter, ignore_errors=True)  # an earlier recipe's
    for path, text in cards.items():
        write_text_atomic(path, text)
    return list(cards), {}


def read_record(out: Path) -> RunRecord:
    """The record of an output folder.

    Raises:
        OutputError: if there is none yet.
    """
    path = out / "checkpoint" / "abliterator" / "record.json"
    if not path.is_file():
        raise OutputError(f"{out} has no record yet; `abliterator build` makes it.")
    return RunRecord.model_validate_json(read_text(path))


RECORD = Stage("record", 3, _record_inputs, _record)
CARD = Stage("card", 6, _card_inputs, _card)
