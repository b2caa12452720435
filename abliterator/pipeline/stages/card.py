"""The stages that tell: record and card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from abliterator.errors import OutputError
from abliterator.files import copy_file, digest_of, read_text, sha256_of_file, write_text_atomic
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Parts, Stage, save_value
from abliterator.pipeline._workspace import remove_whole
from abliterator.pipeline.stages.record import assemble, stated
from abliterator.record import RunRecord
from abliterator.verification import CARD as CARD_FILE
from abliterator.verification import PICTURES, RECIPE, recipe_text
from abliterator.verification import RECORD as RECORD_FILE

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
    base = run.plan.source.folder
    card = sha256_of_file(base / CARD_FILE) if (base / CARD_FILE).is_file() else None
    return [
        {name: run.digest(name) for name in _measured(run)},
        run.recipe.published(),
        [run.base_digest(), card, stated(run.plan.card)],
    ]


def _record(run: Run) -> tuple[list[Path], Parts]:
    out = run.workspace.checkpoint
    markers = {name: run.workspace.marker(name) for name in _measured(run)}
    timing = {name: marker.seconds for name, marker in markers.items() if marker is not None}
    pictures = _pictures(run)
    hashes = {name: sha256_of_file(path) for name, path in pictures.items()}
    record = assemble(run, timing, hashes)
    recipe = out / RECIPE
    write_text_atomic(recipe, recipe_text(record))
    return [save_value(_record_path(run.workspace.out), record), recipe, *pictures.values()], {}


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
    texts = {path.parent.name: text for path, text in _cards(run).items()}
    return [run.digest("record"), digest_of(texts)]  # another version's template is another card


def _cards(run: Run) -> dict[Path, str]:
    """The cards by their paths, as the record has them."""
    from abliterator.card import render_adapter_card, render_card

    out = run.workspace.out
    run.artefact("record", _record_path(out))
    record = read_record(out)
    cards = {run.workspace.checkpoint / CARD_FILE: render_card(record)}
    if run.recipe.edit.adapts:
        cards[run.workspace.adapter / CARD_FILE] = render_adapter_card(record)
    return cards


def _card(run: Run) -> tuple[list[Path], Parts]:
    cards = _cards(run)
    if not run.recipe.edit.adapts and run.workspace.marker("adapter") is not None:
        remove_whole(run.workspace.adapter)  # an earlier recipe's
    for path, text in cards.items():
        write_text_atomic(path, text)
    return list(cards), {}


def read_record(out: Path) -> RunRecord:
    """The record of an output folder.

    Raises:
        OutputError: if there is none yet, or it is damaged.
    """
    path = _record_path(out)
    if not path.is_file():
        raise OutputError(f"{out} has no record yet; `abliterator build` makes it.")
    try:
        return RunRecord.model_validate_json(read_text(path))
    except ValueError as error:
        raise OutputError(
            f"{path} is not a record that this version of abliterator reads. Give the same "
            "`abliterator build` again: it makes the file anew."
        ) from error


def _record_path(out: Path) -> Path:
    return out / "checkpoint" / RECORD_FILE


RECORD = Stage("record", 3, _record_inputs, _record)
CARD = Stage("card", 6, _card_inputs, _card)
