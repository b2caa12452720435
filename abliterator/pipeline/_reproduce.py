"""A rebuilt checkpoint against the published one that its recipe was taken from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from abliterator.errors import OutputError
from abliterator.record import RunRecord
from abliterator.verification import RECORD, read_edits


class Reproduction(NamedTuple):
    """Edited tensors of both, by their sha256.

    Attributes:
        same: how many are the same to the last bit.
        different: names of those that are not, or that only one of both has.
        reasons: what of the two builds differs, as "what: published, rebuilt".
    """

    same: int
    different: tuple[str, ...]
    reasons: tuple[str, ...]


def compare_rebuilt(published: Path, rebuilt: Path) -> Reproduction:
    """Compares two checkpoint folders by their edits.json, and lists their differences.

    Raises:
        CheckpointError: if one of them has no readable edits.json.
        OutputError: if one of them has no readable record.json.
    """
    hashes, rebuilt_hashes = (
        {edit.name: edit.sha256_after for edit in read_edits(folder)}
        for folder in (published, rebuilt)
    )
    different = tuple(
        name
        for name in dict.fromkeys([*hashes, *rebuilt_hashes])
        if hashes.get(name) != rebuilt_hashes.get(name)
    )
    records = _record(published), _record(rebuilt)
    reasons = tuple(_differences(*records)) if different else ()
    return Reproduction(len({*hashes, *rebuilt_hashes}) - len(different), different, reasons)


def _record(folder: Path) -> RunRecord:
    try:
        return RunRecord.model_validate_json((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{folder} has no {RECORD} that this version of abliterator reads, so nobody can tell "
            "how it was built. Use the version that its card names."
        ) from error


def _prompts(record: RunRecord) -> dict[str, str]:
    """sha256 of each prompt set as used."""
    return {origin.name: origin.sha256 for origin in record.provenance.prompts}


def _differences(published: RunRecord, rebuilt: RunRecord) -> Iterator[str]:
    """What differs between two records and may change the bits of a build."""
    pairs = {
        "recipe digest": (published.recipe_digest, rebuilt.recipe_digest),
        "abliterator": (published.tool.version, rebuilt.tool.version),
        "device": (published.provenance.device, rebuilt.provenance.device),
        "hardware": (published.provenance.hardware, rebuilt.provenance.hardware),
        "dtype of computation": (published.provenance.dtype, rebuilt.provenance.dtype),
        "python": (published.provenance.python, rebuilt.provenance.python),
        "platform": (published.provenance.platform, rebuilt.provenance.platform),
    }
    for name, before, after in (
        ("", published.provenance.packages, rebuilt.provenance.packages),
        ("base file ", published.model.files_sha256, rebuilt.model.files_sha256),
        ("prompts of ", _prompts(published), _prompts(rebuilt)),
        ("sha256 of the ", published.provenance.digests, rebuilt.provenance.digests),
    ):
        for key in sorted({*before, *after}):
            pairs[name + key] = before.get(key, "none"), after.get(key, "none")
    for name, (first, second) in pairs.items():
        if first != second:
            yield f"{name}: {first}, {second}"
