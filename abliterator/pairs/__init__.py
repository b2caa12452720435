"""Contrast pairs: two similar requests, of which one shows a behaviour and one does not.

A model behind a server writes them and, given one request at a time, checks them. The package
depends neither on the behaviour nor on the model that will be edited.

    made = make_pairs(spec, cache=Path("pairs.sqlite"), length=WORDS)
    save_pairs(Path("pairs.jsonl"), made, spec, WORDS)

A recipe takes the file as `target: {path: pairs.jsonl, where: {side: target}}`, and its contrast
alike.
"""

from __future__ import annotations

from abliterator.pairs._filter import WORDS, Length
from abliterator.pairs._make import Made, make_pairs
from abliterator.pairs._questions import Candidate, pairs_prompt
from abliterator.pairs._write import cache_beside, require_ours, save_pairs

__all__ = [
    "WORDS",
    "Candidate",
    "Length",
    "Made",
    "cache_beside",
    "make_pairs",
    "pairs_prompt",
    "require_ours",
    "save_pairs",
]
