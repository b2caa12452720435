"""The output folder: whose it is, where artefacts lie, and which stages are done.

    OUT/checkpoint/   exactly what may be published
    OUT/adapter/      the same edit as a LoRA, where the recipe asks for it
    OUT/work/         private: prompts, moments, directions, answers, verdicts, a marker a stage

One run at a time works in it. A stage is done when its marker names the key of its present inputs
and every artefact is as the marker says. Markers are written after the artefacts, both by renaming,
so whatever interrupts a run, the next one redoes what was unfinished.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterator.errors import FileError, OutputError
from abliterator.files import digest_of, partial_of, read_text, write_text_atomic
from abliterator.recipe import Recipe, load_recipe, to_yaml

# Files up to this size are hashed to see whether they are still what a stage left; beyond it, their
# size must do: the weights' own hashes are in edits.json.
HASHED_UP_TO = 64 << 20


@dataclass(frozen=True)
class Marker:
    """What a finished stage left: read from work/stages/NAME.json."""

    key: str
    artefacts: Mapping[str, Mapping[str, Any]]  # path relative to OUT: size, sha256
    seconds: float
    parts: Mapping[str, str]  # keys of parts that can be kept when the stage runs again

    @property
    def digest(self) -> str:
        """Digest of the artefacts' contents: what a later stage depends on."""
        return digest_of(self.artefacts)


class Workspace:
    """One output folder."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.work = out / "work"
        self.checkpoint = out / "checkpoint"
        self.adapter = out / "adapter"
        self._recipe = self.work / "recipe.yaml"
        self._ours = self.work / "abliterator.json"
        self._lock = self.work / "lock"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps every other run out of the folder; the system lets go when this one is killed.

        Raises:
            OutputError: if another run is at work in it.
        """
        from filelock import FileLock, Timeout

        self.work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._lock, blocking=False)
        try:
            lock.acquire()
        except Timeout as error:
            raise OutputError(
                f"Another run is at work in {self.out}. Wait until it ends, or choose another "
                "--out."
            ) from error
        try:
            yield
        finally:
            lock.release()

    def claim(self, recipe: Recipe, *, force: bool) -> Recipe | None:
        """Makes sure that the folder may be used for `recipe`; writes nothing.

        Returns:
            The resolved recipe of an earlier run of the same recipe, or None if this one is the
            first.

        Raises:
            OutputError: if something else is there.
        """
        if not self.out.exists() or self._is_empty():
            return None
        if not self._ours.is_file():
            raise OutputError(
                f"{self.out} exists and was not made by abliterator; nothing in it was touched. "
                f"Choose another --out."
            )
        claimed = json.loads(read_text(self._ours))["recipe_digest"]
        if claimed == recipe.digest:
            return load_recipe(self._recipe) if self._recipe.is_file() else None
        if force:
            return None
        raise OutputError(
            f"{self.out} was made from another recipe (digest {claimed[:12]}, this one is "
            f"{recipe.digest[:12]}). Choose another --out, or go on here with --force: stages "
            f"whose inputs did not change are kept."
        )

    def _is_empty(self) -> bool:
        """Whether the folder holds no file but those of a run that was killed at its first step."""
        begun = {self._lock, partial_of(self._ours)}
        files = (path for path in self.out.rglob("*") if path.is_symlink() or not path.is_dir())
        return self.out.is_dir() and all(path in begun for path in files)

    @property
    def is_ours(self) -> bool:
        """Whether a run made the folder."""
        return self._ours.is_file() and self._recipe.is_file()

    def recipe(self) -> Recipe:
        """The resolved recipe of a folder of ours.

        Raises:
            OutputError: if the folder is not ours.
        """
        if not self.is_ours:
            raise OutputError(f"{self.out} is not a folder that `abliterator build` made.")
        return load_recipe(self._recipe)

    def create(self, requested: Recipe, resolved: Recipe) -> None:
        """Makes the folder ours, unless it is already.

        Wherever this is killed, no claim stands beside what another recipe was resolved to.
        """
        if self._recipe.is_file() and self.requested_digest == requested.digest:
            return
        self._recipe.unlink(missing_ok=True)
        claim = {"tool": "abliterator", "recipe_digest": requested.digest}
        write_text_atomic(self._ours, json.dumps(claim) + "\n")
        plain = resolved.model_dump(mode="json")
        write_text_atomic(self._recipe, to_yaml(plain))

    @property
    def requested_digest(self) -> str:
        """Digest of the recipe as the user gave it, before anything was resolved."""
        digest: str = json.loads(read_text(self._ours))["recipe_digest"]
        return digest

    def remove(self) -> None:
        """Deletes the whole folder; for a run that failed before it made anything worth keeping."""
        shutil.rmtree(self.out)

    def marker(self, stage: str) -> Marker | None:
        """The marker of a stage, or None."""
        try:
            return Marker(**json.loads(read_text(self._marker_path(stage))))
        except (FileError, ValueError, TypeError):
            return None

    def is_done(self, stage: str, key: str) -> bool:
        """Whether the stage was finished with these inputs, and its artefacts are still there."""
        marker = self.marker(stage)
        if marker is None or marker.key != key:
            return False
        return all(
            self._state(self.out / path) == state for path, state in marker.artefacts.items()
        )

    def finish(
        self,
        stage: str,
        key: str,
        artefacts: Iterable[Path],
        *,
        seconds: float,
        parts: Mapping[str, str],
    ) -> None:
        """Writes the marker of a finished stage."""
        states = {str(path.relative_to(self.out)): self._state(path) for path in sorted(artefacts)}
        marker = {"key": key, "artefacts": states, "seconds": seconds, "parts": dict(parts)}
        write_text_atomic(self._marker_path(stage), json.dumps(marker, indent=1) + "\n")

    def _marker_path(self, stage: str) -> Path:
        return self.work / "stages" / f"{stage}.json"

    @staticmethod
    def _state(path: Path) -> dict[str, Any] | None:
        if not path.is_file():
            return None
        size = path.stat().st_size
        if size > HASHED_UP_TO:
            return {"size": size}
        with path.open("rb") as file:
            return {"size": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
