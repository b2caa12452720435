"""Results of a verification, and the names of the files that it reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abliterator.errors import CheckpointError
from abliterator.record import TensorEdit

EDITS = "abliterator/edits.json"
RECORD = "abliterator/record.json"
CARD = "README.md"
RECIPE = "recipe.yaml"
OURS = (CARD, RECIPE, EDITS, RECORD)
"""What abliterator adds to the files of the base."""
PICTURES = ("abliterator/cosines.png", "abliterator/sweep.png")
"""What it adds where layers were chosen by measurement."""
BASE_CARD = "base README.md"
"""What a record's digests call the base's own card, whose licence it states."""


@dataclass(frozen=True)
class Proof:
    """Whether the contract holds, and what breaks it.

    Attributes:
        faults: one sentence each; empty if all holds.
    """

    faults: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no fault."""
        return not self.faults


@dataclass(frozen=True)
class Verification(Proof):
    """Results of a verification; `ok` if the checkpoint is its base with the edits of edits.json.

    Attributes:
        tensors: tensors of the base.
        edited: tensors that edits.json names.
        identical_bytes: bytes, headers and files beside the weights included, equal to the base's.
            config.json is not among them: it is the base's but for what would be false now.
        edited_bytes: bytes of the edited tensors in the checkpoint.
        max_leak: largest |Qᵀ W'| / |Qᵀ W| measured again; None without a subspace.
        base_sha256: sha256 of each weight and auxiliary file of the base, by relative path.
        sha256: the same of the checkpoint, with the files that abliterator adds.
        foreign: files of the checkpoint folder that neither the base nor abliterator put there.
    """

    tensors: int
    edited: int
    identical_bytes: int
    edited_bytes: int
    max_leak: float | None
    base_sha256: Mapping[str, str]
    sha256: Mapping[str, str]
    foreign: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The findings as plain values."""
        return {
            "ok": self.ok,
            "faults": list(self.faults),
            "tensors": self.tensors,
            "edited": self.edited,
            "identical_bytes": self.identical_bytes,
            "edited_bytes": self.edited_bytes,
            "max_leak": self.max_leak,
            "files": dict(self.sha256),
            "foreign": list(self.foreign),
        }


@dataclass
class Findings:
    """Faults, sizes, leaks and hashes, accumulated while the files are read."""

    faults: list[str] = field(default_factory=list)
    identical_bytes: int = 0
    edited_bytes: int = 0
    leaks: list[float] = field(default_factory=list)
    base_sha256: dict[str, str] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)

    def fault(self, sentence: str) -> None:
        """Adds a fault, as one sentence."""
        self.faults.append(sentence)


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
