"""Results of a verification, and the names of the files that it reads."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from abliterator.errors import CheckpointError
from abliterator.record import TensorEdit

EDITS = "abliterator/edits.json"
RECORD = "abliterator/record.json"
DIRECTIONS = "abliterator/directions.safetensors"
"""The removed subspace with its sites, for other programs; a record has its hash."""
CARD = "README.md"
RECIPE = "recipe.yaml"
OURS = (CARD, RECIPE, EDITS, RECORD)
"""What abliterator adds to the files of the base."""
PICTURES = ("abliterator/cosines.png", "abliterator/sweep.png")
"""What it adds where layers were chosen by measurement."""
BASE_CARD = "base README.md"
"""What a record's digests call the base's own card, whose licence it states."""


@dataclass
class Findings:
    """Faults, sizes, leaks, distances and hashes, accumulated while the files are read.

    Distances are those of stored from exact weights, as multiples of the rounding noise.
    """

    faults: list[str] = field(default_factory=list)
    identical_bytes: int = 0
    edited_bytes: int = 0
    leaks: list[float] = field(default_factory=list)
    apart: list[float] = field(default_factory=list)
    base_sha256: dict[str, str] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)

    def fault(self, sentence: str) -> None:
        """Adds a fault, as one sentence."""
        self.faults.append(sentence)

    def add(self, other: Findings) -> None:
        """Adds what was found in another file."""
        self.faults += other.faults
        self.identical_bytes += other.identical_bytes
        self.edited_bytes += other.edited_bytes
        self.leaks += other.leaks
        self.apart += other.apart
        self.base_sha256 |= other.base_sha256
        self.sha256 |= other.sha256


def read_edits(checkpoint: Path) -> tuple[TensorEdit, ...]:
    """The edits that a checkpoint folder says were made to its base.

    Raises:
        CheckpointError: if edits.json is missing or is not what abliterator writes.
    """
    path = checkpoint / EDITS
    try:
        return tuple(
            TensorEdit.model_validate(edit) for edit in json.loads(path.read_text("utf-8"))
        )
    except (OSError, ValueError, TypeError) as error:
        fault = "has no" if isinstance(error, OSError) else "has an unreadable"
        raise CheckpointError(
            f"{checkpoint} {fault} {EDITS}, which says what was edited; a checkpoint that "
            "`abliterator build` or `abliterator bake` wrote was expected. Build it again."
        ) from error


def format_leak(leak: float | None) -> str:
    """A leak as text for a message."""
    return "none" if leak is None else f"{leak:.2e}"
