"""Pairs as lines of JSON: one request a line, each with its side, its pair and its origin."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from abliterator.errors import FileError, OutputError
from abliterator.files import as_lines, read_lines, write_text_atomic
from abliterator.pairs._filter import Length
from abliterator.pairs._make import Made
from abliterator.pairs._questions import SIDES, pairs_prompt
from abliterator.recipe import PairsSpec
from abliterator.server import without_folder


def rows(made: Made, spec: PairsSpec, length: Length) -> Iterator[dict[str, Any]]:
    """One row for each request, categories interleaved, so that every prefix is balanced."""
    prompt = pairs_prompt()
    origin = {
        "tokenizer": without_folder(spec.tokenizer),  # None where words are counted
        "model": spec.server.model,
        "served_model": ", ".join(made.served),
        "prompt_version": prompt.version,
        "prompt_sha256": prompt.sha256,
        "spec_sha256": spec.digest,
    }
    pair_number = 0
    for one_per_category in zip(*made.pairs.values(), strict=True):
        for category, pair in zip(made.pairs, one_per_category, strict=True):
            for side in SIDES:
                text = getattr(pair, side)
                yield {
                    "prompt": text,
                    "side": side,
                    "pair": pair_number,
                    "category": category,
                    length.unit: length.of(text),
                    **origin,
                }
            pair_number += 1


def save_pairs(path: Path, made: Made, spec: PairsSpec, length: Length) -> None:
    """Writes the file of pairs atomically."""
    lines = (json.dumps(row, ensure_ascii=False) for row in rows(made, spec, length))
    write_text_atomic(path, as_lines(lines))


def cache_beside(path: Path) -> Path:
    """Path of the cache of replies of a pairs file: the same name, ending in .sqlite.

    Raises:
        OutputError: if the file's own name does not end in .jsonl.
    """
    if path.suffix.lower() != ".jsonl":
        raise OutputError(
            f"Pairs are written as .jsonl, and --out is {path.name}. Give a name that ends in "
            ".jsonl; replies are kept beside it under the same name, as .sqlite."
        )
    return path.with_suffix(".sqlite")


def require_ours(path: Path, spec: PairsSpec) -> None:
    """Raises OutputError if the path exists and was not written from this spec."""
    if not path.exists():
        return
    try:
        is_ours = json.loads(read_lines(path)[0])["spec_sha256"] == spec.digest
    except (FileError, IndexError, ValueError, KeyError, TypeError):
        is_ours = False
    if not is_ours:
        raise OutputError(
            f"{path} exists, and was not made from this spec. Give another --out, or "
            "move that file away."
        )
