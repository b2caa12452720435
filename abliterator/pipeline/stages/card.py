"""The model card, and the card of the adapter, made from the record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from abliterator.files import digest_of, write_text_atomic
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Stage
from abliterator.pipeline._workspace import remove_whole
from abliterator.pipeline.stages.record import RECORD_JSON, read_record
from abliterator.verification import CARD as CARD_FILE


def _key(run: Run) -> Any:
    texts = {path.parent.name: text for path, text in _cards(run).items()}
    return [run.digest("record"), digest_of(texts)]  # another version's template is another card


def _run(run: Run) -> list[Path]:
    cards = _cards(run)
    if not run.recipe.edit.adapts and run.workspace.marker("adapter") is not None:
        remove_whole(run.workspace.adapter)  # an earlier recipe's
    for path, text in cards.items():
        write_text_atomic(path, text)
    return list(cards)


def _cards(run: Run) -> dict[Path, str]:
    """The cards by their paths."""
    from abliterator.card import render_adapter_card, render_card

    RECORD_JSON.checked(run)
    record = read_record(run.workspace.out)
    cards = {run.workspace.checkpoint / CARD_FILE: render_card(record)}
    if run.recipe.edit.adapts:
        cards[run.workspace.adapter / CARD_FILE] = render_adapter_card(record)
    return cards


CARD = Stage("card", 6, _key, _run)
