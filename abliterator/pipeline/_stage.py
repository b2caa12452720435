"""What a stage is: a function with a key and a version.

A stage's key holds all that its result depends on: its slice of the recipe, the digests of the
artefacts it reads, the base's file hashes, and its own version. Raise the version when the code
changes what it leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterator.files import digest_of, write_text_atomic
from abliterator.pipeline._run import Run
from abliterator.record import Frozen

Parts = Mapping[str, str]


@dataclass(frozen=True)
class Stage:
    """One arrow of the data flow.

    Attributes:
        name: as in commands, markers and `timing`.
        version: of the stage's own code.
        inputs: all that the result depends on, as a JSON value.
        run: does the work; returns the artefacts, and keys of parts that can be kept.
    """

    name: str
    version: int
    inputs: Callable[[Run], Any]
    run: Callable[[Run], tuple[list[Path], Parts]]

    def key(self, run: Run) -> str:
        """Digest of the inputs and the version."""
        return digest_of([self.name, self.version, self.inputs(run)])


def kept_parts(run: Run, stage: str, parts: Parts) -> set[str]:
    """Which parts an earlier run of the stage left that are still what they would be now.

    So the base's answers outlive a change of the edit.
    """
    marker = run.workspace.marker(stage)
    if marker is None or not run.workspace.is_done(stage, marker.key):
        return set()
    return {part for part, key in parts.items() if marker.parts.get(part) == key}


def save_value(path: Path, value: Frozen) -> Path:
    """Writes a typed result as JSON, and returns its path."""
    write_text_atomic(path, value.model_dump_json(indent=1) + "\n")
    return path
