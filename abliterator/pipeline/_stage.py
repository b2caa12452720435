"""A stage: a function with a key and a version, and the files that it writes.

A stage's key is the digest of all that its result depends on: its sections of the recipe, the
digests of the artefacts that it reads, the hashes of the base's files, and its own version. Raise
the version when a change of the code changes the files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from pydantic import BaseModel

from abliterator.files import as_lines, digest_of, read_lines, read_text, write_text_atomic
from abliterator.pipeline._run import Run
from abliterator.pipeline._workspace import Workspace

Value = TypeVar("Value", bound=BaseModel)


@dataclass(frozen=True)
class Stage:
    """One step from a recipe to a card.

    Attributes:
        name: as in commands, markers and `timing`.
        version: of the stage's own code.
        inputs: all that the result depends on, as a JSON value.
        run: does the work, and returns the files that it wrote.
        parts: keys of parts of the result that outlive a change of the stage's other inputs.
        asks_model: whether it gives the recipe's prompts to a model, which has to fit them.
    """

    name: str
    version: int
    inputs: Callable[[Run], Any]
    run: Callable[[Run], Sequence[Path]]
    parts: Callable[[Run], Mapping[str, str]] = lambda run: {}
    asks_model: bool = False

    def key(self, run: Run) -> str:
        """Digest of the inputs and the version."""
        return digest_of([self.name, self.version, self.inputs(run)])

    def kept(self, run: Run) -> set[str]:
        """Parts of an earlier run's result whose keys have not changed.

        So the base's answers outlive a change of the edit.
        """
        marker = run.workspace.marker(self.name)
        if marker is None or not run.workspace.is_done(self.name, marker.key):
            return set()
        return {part for part, key in self.parts(run).items() if marker.parts.get(part) == key}


class InWorkspace(Protocol):
    """What artefacts are read from: a run, or a folder whose build is over."""

    workspace: Workspace


class Artefact(NamedTuple):
    """A file that a stage writes, by its path in the output folder.

    Reading raises OutputError where the file is not as the stage left it.
    """

    stage: str
    name: str

    def path(self, run: InWorkspace) -> Path:
        """Where the stage writes it."""
        return run.workspace.out / self.name

    def checked(self, run: InWorkspace) -> Path:
        """The path, after checking that the file is as the stage left it."""
        return run.workspace.artefact(self.stage, self.path(run))

    def write(self, run: InWorkspace, value: BaseModel) -> Path:
        """Writes a typed result as JSON; returns the path."""
        write_text_atomic(self.path(run), value.model_dump_json(indent=1) + "\n")
        return self.path(run)

    def read(self, run: InWorkspace) -> Any:
        """The plain values of a JSON file."""
        return json.loads(read_text(self.checked(run)))

    def read_as(self, run: InWorkspace, kind: type[Value]) -> Value:
        """The typed result of a JSON file."""
        return kind.model_validate_json(read_text(self.checked(run)))

    def write_lines(self, run: InWorkspace, values: Iterable[BaseModel]) -> Path:
        """Writes typed results, one JSON object a line; returns the path."""
        write_text_atomic(self.path(run), as_lines(value.model_dump_json() for value in values))
        return self.path(run)

    def read_lines(self, run: InWorkspace, kind: type[Value]) -> list[Value]:
        """The typed results of a file of JSON lines."""
        return [kind.model_validate_json(line) for line in read_lines(self.checked(run))]
