"""The output folder: the recipe that it belongs to, paths of artefacts, and which stages are done.

    OUT/checkpoint/   exactly what may be published
    OUT/adapter/      the same edit as a LoRA, where the recipe asks for it
    OUT/work/         private: prompts, moments, directions, answers, verdicts, a marker a stage

One run at a time works in it. A stage is done when its marker names the key of its present inputs
and every artefact has the hash that the marker says. Markers are written after the artefacts, both
by renaming, so whatever interrupts a run, the next one redoes what was unfinished. An artefact is
read through `artefact` or `digest`, which compare it with its marker first.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from abliterator.errors import FileError, OutputError
from abliterator.files import (
    FileHashes,
    digest_of,
    partial_of,
    read_text,
    sha256_of_bytes,
    shown,
    write_text_atomic,
)
from abliterator.recipe import Recipe, load_recipe, to_yaml
from abliterator.record import Frozen

# Smaller artefacts are hashed whenever they are read: that costs less than to remember them.
_REMEMBERED_FROM = 1 << 20  # bytes


class Marker(Frozen):
    """Key, artefacts and seconds of a finished stage: work/stages/NAME.json."""

    key: str
    artefacts: dict[str, dict[str, int | str]]  # path relative to OUT: size, sha256
    seconds: float
    parts: dict[str, str]  # keys of parts that can be kept when the stage runs again

    @property
    def digest(self) -> str:
        """Digest of the artefacts' contents, which is part of later stages' keys."""
        return digest_of(self.artefacts)


class Claim(Frozen):
    """The recipe that the folder belongs to: work/abliterator.json."""

    tool: str
    recipe_digest: str  # of the recipe as the user gave it, before anything was resolved
    resolved_sha256: str | None = None  # of recipe.yaml; None in folders of older versions


@contextmanager
def usable(out: Path) -> Iterator[None]:
    """Turns an OSError at or below `out`, or of a full disk, into an OutputError.

    Every other OSError is raised unchanged.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"The disk of {out} is full. Make room, and give the same command again: it goes "
                "on where it stopped."
            ) from error
        path = _path_within(error, out)
        if path is None:
            raise
        raise OutputError(
            f"{path} cannot be used: {error.strerror or error}. Choose an --out that you may "
            "write to, where abliterator finds its own files as it left them."
        ) from error


def remove_whole(path: Path) -> None:
    """Removes a folder with all that is in it, or a file of that name, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:  # rmtree would open it, and block at a named pipe
        path.unlink(missing_ok=True)


def _path_within(error: OSError, out: Path) -> str | None:
    """The path of an error, if it is `out`, within it, or a parent of it."""
    root = out.absolute()
    for name in (error.filename, error.filename2):
        if isinstance(name, (str, bytes, os.PathLike)):
            path = Path(os.fsdecode(name)).absolute()
            if path.is_relative_to(root) or root.is_relative_to(path):
                return shown(path)
    return None


class Workspace:
    """One output folder."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.work = out / "work"
        self.checkpoint = out / "checkpoint"
        self.adapter = out / "adapter"
        self.fingerprints = self.work / "fingerprint.json"
        self._recipe_path = self.work / "recipe.yaml"
        self._claim_path = self.work / "abliterator.json"
        self._lock_path = self.work / "lock"
        self._is_removed = False
        self._hashes = FileHashes(self.fingerprints, least=_REMEMBERED_FROM)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Locks the folder against other runs; a killed run's lock is released by the system.

        Raises:
            OutputError: if another run is at work in it, or no file can be locked there.
        """
        from filelock import FileLock, Timeout

        self.work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._lock_path, blocking=False)
        try:
            lock.acquire()
        except Timeout as error:
            raise OutputError(
                f"Another run is at work in {self.out}. Wait until it ends, or choose another "
                "--out."
            ) from error
        except NotImplementedError as error:
            raise OutputError(
                f"The file system of {self.out} locks no files, which keeps two runs apart. "
                "Choose an --out on another one."
            ) from error
        try:
            yield
        finally:
            lock.release()
            if self._is_removed:
                self._remove_lock()

    def claim(self, recipe: Recipe, *, force: bool) -> Recipe | None:
        """Checks that the folder may be used for `recipe`; writes nothing.

        Returns:
            The resolved recipe of an earlier run of the same recipe, or None if this one is the
            first.

        Raises:
            OutputError: if something else is there.
        """
        if not self.out.exists() or self._is_empty():
            return None
        if not self._claim_path.is_file():
            raise OutputError(
                f"{self.out} exists and was not made by abliterator; nothing in it was touched. "
                f"Choose another --out."
            )
        try:
            claimed = self._claim().recipe_digest
            if claimed == recipe.digest:
                return self.recipe() if self._recipe_path.is_file() else None
        except OutputError:
            if force:  # what is damaged is resolved again
                return None
            raise
        if force:
            return None
        raise OutputError(
            f"{self.out} was made from another recipe (digest {claimed[:12]}, this one is "
            f"{recipe.digest[:12]}). Choose another --out, or go on here with --force: stages "
            f"whose inputs did not change are kept."
        )

    def _is_empty(self) -> bool:
        """Whether the folder holds no file but those of a run that was killed at its first step."""
        leftovers = {self._lock_path, partial_of(self._claim_path)}
        files = (path for path in self.out.rglob("*") if path.is_symlink() or not path.is_dir())
        return self.out.is_dir() and all(path in leftovers for path in files)

    @property
    def is_ours(self) -> bool:
        """Whether a run made the folder."""
        return self._claim_path.is_file() and self._recipe_path.is_file()

    def recipe(self) -> Recipe:
        """The resolved recipe of a folder of ours.

        Raises:
            OutputError: if the folder is not ours, or its recipe was changed.
        """
        if not self.is_ours:
            raise OutputError(f"{self.out} is not a folder that `abliterator build` made.")
        claimed = self._claim().resolved_sha256
        if claimed not in (None, self._hashes.sha256(self._recipe_path)):
            raise OutputError(
                f"{self._recipe_path} is not as abliterator left it: it says what this folder was "
                "made from, and is not for editing. Change the recipe that it came from, and build "
                "that: with --force in this folder, or in another --out."
            )
        return load_recipe(self._recipe_path)

    def create(self, requested: Recipe, resolved: Recipe) -> None:
        """Writes the claim and the resolved recipe, unless they are there already.

        Wherever this is killed, no claim is left with the resolved form of another recipe.
        """
        text = to_yaml(resolved.model_dump(mode="json"))
        digest = sha256_of_bytes(text.encode())
        claim = Claim(tool="abliterator", recipe_digest=requested.digest, resolved_sha256=digest)
        with suppress(OutputError, FileError):
            if self._claim() == claim and self._hashes.sha256(self._recipe_path) == digest:
                return
        self._recipe_path.unlink(missing_ok=True)
        write_text_atomic(self._claim_path, claim.model_dump_json() + "\n")
        write_text_atomic(self._recipe_path, text)

    def _claim(self) -> Claim:
        try:
            return Claim.model_validate_json(read_text(self._claim_path))
        except (FileError, ValueError) as error:
            raise OutputError(
                f"{self._claim_path} is damaged, so nobody can tell which recipe {self.out} was "
                "made from. Choose another --out, or go on here with --force: stages whose inputs "
                "did not change are kept."
            ) from error

    def remove(self) -> None:
        """Deletes the whole folder, after a run that failed before its first results.

        Where no open file can be deleted, as on Windows, the lock goes when `held` ends.
        """
        for path in (*self.out.iterdir(), *self.work.iterdir()):
            if path not in (self.work, self._lock_path):
                remove_whole(path)
        self._is_removed = True
        self._remove_lock()

    def _remove_lock(self) -> None:
        with suppress(OSError):  # it is locked, or was removed already
            self._lock_path.unlink()
            self.work.rmdir()
            self.out.rmdir()
            self._is_removed = False

    def marker(self, stage: str) -> Marker | None:
        """The marker of a stage, or None."""
        try:
            return Marker.model_validate_json(read_text(self._marker_path(stage)))
        except (FileError, ValueError):
            return None

    def is_done(self, stage: str, key: str) -> bool:
        """Whether the stage was finished with these inputs, and no artefact was changed since."""
        marker = self.marker(stage)
        return marker is not None and marker.key == key and not self._changed(marker)

    def digest(self, stage: str) -> str:
        """Digest of the artefacts of a finished stage.

        Raises:
            OutputError: if an artefact was changed since.
        """
        marker = self._finished(stage)
        for path in self._changed(marker):
            raise self._was_changed(stage, self.out / path)
        return marker.digest

    def artefact(self, stage: str, path: Path) -> Path:
        """The path of an artefact of a finished stage, after comparing it with the marker.

        Raises:
            OutputError: if it was changed since.
        """
        state = self._finished(stage).artefacts.get(self._name(path))
        if state is None or self._state(path) != state:
            raise self._was_changed(stage, path)
        return path

    def _finished(self, stage: str) -> Marker:
        marker = self.marker(stage)
        if marker is None:
            raise OutputError(
                f"{self.out} has no result of the stage `{stage}`, or a damaged one. Go on with "
                "`abliterator build`."
            )
        return marker

    def _was_changed(self, stage: str, path: Path) -> OutputError:
        return OutputError(
            f"{path} is not as the stage `{stage}` left it: it was changed or lost since, and what "
            "is made of it would be of no known origin. Give the same `abliterator build` again: "
            "it makes the file anew."
        )

    def _changed(self, marker: Marker) -> list[str]:
        """Paths of the artefacts whose size or hash is not the marker's."""
        states = marker.artefacts.items()
        changed = [path for path, state in states if self._state(self.out / path) != state]
        self._hashes.save()
        return changed

    def finish(self, stage: str, key: str, artefacts: Iterable[Path], **details: Any) -> None:
        """Writes the marker of a finished stage; `details` are its seconds and parts."""
        states = {self._name(path): self._state(path) for path in sorted(artefacts)}
        marker = Marker.model_validate({"key": key, "artefacts": states, **details})
        write_text_atomic(self._marker_path(stage), marker.model_dump_json(indent=1) + "\n")
        remove_whole(self.partial(stage))
        with suppress(OSError):  # parts of another stage are there
            self.partial(stage).parent.rmdir()

    def partial(self, stage: str) -> Path:
        """The folder of finished parts of a stage that is not finished."""
        return self.work / "partial" / stage

    def _marker_path(self, stage: str) -> Path:
        return self.work / "stages" / f"{stage}.json"

    def _name(self, path: Path) -> str:
        return path.relative_to(self.out).as_posix()

    def _state(self, path: Path) -> dict[str, Any] | None:
        """Size and hash of a file; None where there is none."""
        if not path.is_file():
            return None
        return {"size": path.stat().st_size, "sha256": self._hashes.sha256(path)}
