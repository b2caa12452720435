"""Compares the files beside the weights with the base's, and with what the record allows."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from abliterator.checkpoint import (
    CONFIG_ENTRY,
    CONFIG_FILE,
    INDEX_FILE,
    QUANTISER_FILE,
    Checkpoint,
    edited_config,
    edited_index,
    edited_quantiser_config,
)
from abliterator.errors import FileError
from abliterator.files import read_text, sha256_of_file
from abliterator.formats import Dequantized
from abliterator.recipe import to_yaml
from abliterator.record import RunRecord, TensorEdit
from abliterator.verification._findings import (
    BASE_CARD,
    CARD,
    DIRECTIONS,
    EDITS,
    PICTURES,
    RECIPE,
    RECORD,
    Findings,
    format_leak,
)

_SHA256 = re.compile(r"[0-9a-f]{64}")
_ENTRY = {
    "version": re.compile(r"\d[\w.+]{0,40}", re.ASCII),
    "recipe_digest": _SHA256,
    "subspace_sha256": _SHA256,
}


class AuxiliaryFileCheck:
    """Compares the files beside the weights of one checkpoint with what they must be."""

    def __init__(
        self, base: Checkpoint, checkpoint: Path, dequantized: Dequantized, findings: Findings
    ) -> None:
        self._base, self._checkpoint, self._findings = base, checkpoint, findings
        self._dequantized = dequantized
        self._edited = {
            INDEX_FILE: edited_index(base, dequantized.dense, dequantized.dropped),
            QUANTISER_FILE: edited_quantiser_config(base.folder, dequantized.modules),
        }

    def compare(self, file: str) -> None:
        """Compares one file with the base's, or with the one text that an edit may make of it."""
        path, findings = self._checkpoint / file, self._findings
        findings.base_sha256[file] = sha256_of_file(self._base.folder / file)
        if not path.is_file():
            findings.fault(f"{file} is missing.")
            return
        findings.sha256[file] = sha256_of_file(path)
        if file == CONFIG_FILE:
            self._compare_config(path.read_bytes(), file)
        elif (text := self._edited.get(file)) is not None:
            if path.read_bytes() != text.encode():
                findings.fault(f"{file} is not what the edit makes of the base's.")
        elif findings.sha256[file] == findings.base_sha256[file]:
            findings.identical_bytes += path.stat().st_size
        else:
            findings.fault(f"{file} differs from the base's.")

    def _compare_config(self, text: bytes, file: str) -> None:
        entry = _entry_of(text)
        if entry is None:
            self._findings.fault(
                f"{file} has no entry {CONFIG_ENTRY!r} with the version and the digest that "
                "abliterator writes."
            )
            return
        allowed = edited_config(self._base.config, entry, changed=self._dequantized.config)
        if text != allowed.encode():
            self._findings.fault(
                f"{file} differs from the base's by more than what abliterator changes in it."
            )


def _entry_of(config: bytes) -> dict[str, str] | None:
    """The entry of a config.json, if it has the keys and values that `bake` writes."""
    try:
        entry = json.loads(config)[CONFIG_ENTRY]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if not isinstance(entry, dict) or "version" not in entry or not entry.keys() <= _ENTRY.keys():
        return None
    sound = all(isinstance(v, str) and _ENTRY[key].fullmatch(v) for key, v in entry.items())
    return entry if sound else None


def recipe_text(record: RunRecord) -> str:
    """The text of recipe.yaml beside a record."""
    return to_yaml(record.recipe)


def card_faults(folder: Path, expected: str, record: RunRecord) -> list[str]:
    """Compares the README.md of a folder with the card of its record: one fault, or none.

    Where the record states no licence, one that `publish` put into the header is ignored.

    Args:
        folder: of checkpoint or adapter.
        expected: the card as rendered.
        record: its record.
    """
    from abliterator.card import stated_license, with_license

    path = folder / CARD
    try:
        text = read_text(path)
    except FileError:
        return [f"{CARD} is missing or cannot be read."]
    added = stated_license(text) if record.model.license is None else None
    if text == expected or (added is not None and text == with_license(expected, added)):
        return []
    card_version, own_version = record.tool.version, version("abliterator")
    if card_version == own_version:
        remedy = "run `abliterator card` again."
        return [f"{CARD} is not the card that {RECORD} is rendered to: {remedy}"]
    return [
        f"{CARD} is not the card that abliterator {own_version} renders {RECORD} to, which "
        f"abliterator {card_version} made: run `abliterator card` again with this "
        "version, or verify with that one."
    ]


def _check_texts(checkpoint: Path, record: RunRecord, findings: Findings) -> None:
    """Compares card and recipe with the texts that the record gives."""
    from abliterator.card import render_card

    findings.faults += card_faults(checkpoint, render_card(record), record)
    try:
        same = read_text(checkpoint / RECIPE) == recipe_text(record)
    except FileError:
        same = False
    if not same:
        findings.fault(f"{RECIPE} is missing, or is not the recipe of {RECORD}.")


def check_record(
    base: Path, checkpoint: Path, named: Mapping[str, TensorEdit], findings: Findings
) -> None:
    """What record.json, and so the card, says of the edit and of the base; nothing if none is.

    The files that it vouches for are hashed, like the files that abliterator always writes.
    """
    path = checkpoint / RECORD
    if not path.is_file():
        return
    try:
        record = RunRecord.model_validate_json(read_text(path))
    except (FileError, ValueError):
        findings.fault(f"{RECORD} is not a record that this version of abliterator can read.")
        return
    config = checkpoint / CONFIG_FILE
    entry = _entry_of(config.read_bytes()) if config.is_file() else None
    if entry is not None and entry.get("recipe_digest") != record.recipe_digest:
        findings.fault(f"{CONFIG_FILE} names another recipe than {RECORD}.")
    if record.edit.tensors != len(named):
        findings.fault(
            f"{RECORD} speaks of {record.edit.tensors} edited tensors, {EDITS} of {len(named)}."
        )
    leak = max((edit.leak for edit in named.values() if edit.leak is not None), default=None)
    if record.edit.max_leak != leak:
        findings.fault(
            f"{RECORD} says that the largest leak is {format_leak(record.edit.max_leak)}, {EDITS} "
            f"{format_leak(leak)}."
        )
    vouched = {file: record.pictures[file] for file in PICTURES if file in record.pictures}
    if DIRECTIONS in record.files:
        vouched[DIRECTIONS] = record.files[DIRECTIONS]
    for file, digest in sorted(vouched.items()):
        path = checkpoint / file
        if path.is_file() and sha256_of_file(path) == digest:
            findings.sha256[file] = digest
        else:
            kind = "picture" if file in PICTURES else "file"
            findings.fault(f"{file} is not the {kind} that {RECORD} has the hash of.")
    for file, digest in record.model.files_sha256.items():
        if findings.base_sha256.get(file) != digest:
            findings.fault(f"{file} of the base is not the one that {RECORD} was made with.")
    stated = record.provenance.digests.get(BASE_CARD)
    card = base / CARD
    if stated is not None and not (card.is_file() and sha256_of_file(card) == stated):
        findings.fault(
            f"{CARD} of the base, which states its licence, is not the one that {RECORD} was made "
            "with: run `abliterator card` again."
        )
    _check_texts(checkpoint, record, findings)
