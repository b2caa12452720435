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
    """Compares two checkpoint folders by their edits.json, and explains what differs.

    Raises:
        CheckpointError: if one of them has no readable edits.json.
        OutputError: if one of them has no readable record.json.
    """
    then, now = (
        {edit.name: edit.sha256_after for edit in read_edits(folder)}
        for folder in (published, rebuilt)
    )
    different = tuple(
        name for name in dict.fromkeys([*then, *now]) if then.get(name) != now.get(name)
    )
    records = _record(published), _record(rebuilt)
    reasons = tuple(_differences(*records)) if different else ()
    return Reproduction(len({*then, *now}) - len(different), different, reasons)


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


def _differences(then: RunRecord, now: RunRecord) -> Iterator[str]:
    """What could make the same recipe give other bits."""
    pairs = {
        "recipe digest": (then.recipe_digest, now.recipe_digest),
        "abliterator": (then.tool.version, now.tool.version),
        "device": (then.provenance.device, now.provenance.device),
        "hardware": (then.provenance.hardware, now.provenance.hardware),
        "dtype of computation": (then.provenance.dtype, now.provenance.dtype),
        "python": (then.provenance.python, now.provenance.python),
        "platform": (then.provenance.platform, now.provenance.platform),
    }
    for name, past, present in (
        ("", then.provenance.packages, now.provenance.packages),
        ("base file ", then.model.files_sha256, now.model.files_sha256),
        ("prompts of ", _prompts(then), _prompts(now)),
        ("sha256 of the ", then.provenance.digests, now.provenance.digests),
    ):
        for key in sorted({*past, *present}):
            pairs[name + key] = past.get(key, "none"), present.get(key, "none")
    for what, (first, second) in pairs.items():
        if first != second:
            yield f"{what}: {first}, {second}"
