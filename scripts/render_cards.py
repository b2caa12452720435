"""Write every card of model_cards/ again, each from the record beside it.

    python scripts/render_cards.py            # NAME.md from NAME.json, for every record
    python scripts/render_cards.py NAME OUT   # ... after copying the record of the build in OUT

Only models that were really built have a record, and so a card.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from abliterator.card import render_card
from abliterator.record import RunRecord

FOLDER = Path(__file__).parents[1] / "model_cards"


def cards() -> Iterator[tuple[str, str]]:
    """(file name, text) of every card."""
    for path in sorted(FOLDER.glob("*.json")):
        record = RunRecord.model_validate_json(path.read_text("utf-8"))
        yield f"{path.stem}.md", render_card(record)


if __name__ == "__main__":
    if sys.argv[1:]:
        name, out = sys.argv[1:]
        record = Path(out) / "checkpoint" / "abliterator" / "record.json"
        shutil.copy(record, FOLDER / f"{name}.json")
    for file, text in cards():
        (FOLDER / file).write_text(text, encoding="utf-8")
