"""Bakes a given subspace into a model without a recipe; writes a complete checkpoint or nothing."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from abliterator.bake import bake
from abliterator.checkpoint import CONFIG_FILE
from abliterator.errors import DirectionError, OutputError, RecipeError
from abliterator.files import sha256_of_file, shown, write_text_atomic
from abliterator.pipeline._planning._plan import make_plan, require_room
from abliterator.pipeline._workspace import usable
from abliterator.pipeline.stages.bake import edits_json
from abliterator.recipe import Edit
from abliterator.record import TensorEdit
from abliterator.source import resolve_folder
from abliterator.verification import EDITS

# In the output folder until every file of the checkpoint is in its place. What lies beside it is of
# this run, or of one that was killed: the folder was empty before.
UNFINISHED = ".partial"


def bake_subspace(
    model: str, subspace: Path, out: Path, *, edit: Edit | None = None
) -> tuple[TensorEdit, ...]:
    """Bakes a given subspace into a model, without a recipe: `out` becomes the edited checkpoint.

    What a killed call left in `out` is removed by the next one. Files move into `out` when all
    of them are written, config.json as the last one, without which no loader takes the folder.

    Args:
        model: Hub id or local folder.
        subspace: safetensors file with a tensor `subspace` [H, k], or [L, H, k], of which Q[i] is
            removed from what block i writes (L = n_layers); columns are made orthonormal.
        out: a folder that does not exist yet, or is empty.
        edit: how; by default strength 1 on every writer.

    Raises:
        AbliteratorError: if model, subspace and folder do not fit together, or a file cannot be
            read or written; nothing is left in `out`.
    """
    if edit is not None and edit.adapts:
        raise RecipeError(
            "`edit.output` is a recipe's; a subspace baked alone has a checkpoint only."
        )
    from abliterator.directions import load_subspace
    from abliterator.subspace import is_by_writer

    with usable(out):
        _require_empty(out, names=None)
        plan = make_plan(resolve_folder(model, revision=None), edit or Edit(), out)
        made_from = {"subspace_sha256": sha256_of_file(subspace)}
        basis = load_subspace(subspace).basis
        if is_by_writer(basis):
            raise DirectionError(
                f"{subspace} holds an edit for each module that writes (U and V), and no subspace. "
                "Only the recipe that made it bakes it: give `abliterator build` that recipe, or "
                "use the checkpoint's own abliterator/directions.safetensors at run time."
            )
        names = {*plan.checkpoint.weight_files, *plan.carried, EDITS}
        with _all_or_nothing(out, names) as unfinished:
            require_room(plan, out)
            edits = bake(plan.checkpoint, plan.edits, basis, unfinished, made_from=made_from)
            write_text_atomic(unfinished / EDITS, edits_json(edits))
    return edits


def _require_empty(out: Path, names: Collection[str] | None) -> None:
    """Raises OutputError for a folder with other files than those of a killed call.

    Args:
        out: the folder.
        names: files that a call may have left beside the unfinished ones; None skips that check.
    """
    unfinished = out / UNFINISHED
    if not (out.exists() or out.is_symlink()):
        return
    if not out.is_dir() or (any(out.iterdir()) and not unfinished.is_dir()):
        raise OutputError(f"{out} exists and is not an empty folder. Choose another --out.")
    if names is None:
        return
    for path in out.rglob("*"):
        name = path.relative_to(out).as_posix()
        is_folder = path.is_dir() and not path.is_symlink()
        if not (is_folder or name in names or path.is_relative_to(unfinished)):
            raise OutputError(
                f"{out} holds {shown(name)} beside the files that a killed `abliterator bake` "
                "left; nothing in it was touched. Choose another --out."
            )


@contextmanager
def _all_or_nothing(out: Path, names: Collection[str]) -> Iterator[Path]:
    """Yields a folder whose files move into `out` on success, and are removed on failure.

    Args:
        out: where they go.
        names: of all files, relative to the folder.
    """
    new_folders = [path for path in (out, *out.parents) if not path.exists()]  # the innermost first
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        _require_empty(out, names)
        unfinished = out / UNFINISHED
        try:
            _clear(out, names)
            unfinished.mkdir()
            yield unfinished
            for file in sorted(names, key=lambda name: (name == CONFIG_FILE, name)):
                (out / file).parent.mkdir(parents=True, exist_ok=True)
                (unfinished / file).replace(out / file)
            shutil.rmtree(unfinished)
        except BaseException:
            with suppress(OSError):
                _clear(out, names)
                for folder in new_folders:
                    folder.rmdir()
            raise


def _clear(out: Path, names: Collection[str]) -> None:
    """Removes the files of an unfinished call, config.json first; then the folders that it made."""
    for file in sorted(names, key=lambda name: (name != CONFIG_FILE, name)):
        (out / file).unlink(missing_ok=True)
    for folder in {parent for file in names for parent in Path(file).parents} - {Path()}:
        shutil.rmtree(out / folder, ignore_errors=True)
    if (out / UNFINISHED).exists():
        shutil.rmtree(out / UNFINISHED)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Locks a folder against other calls, where the system has such locks; makes no file."""
    if sys.platform == "win32":
        yield
    else:
        descriptor = os.open(out, os.O_RDONLY)
        try:
            _lock(descriptor, out)
            yield
        finally:
            os.close(descriptor)


def _lock(descriptor: int, out: Path) -> None:
    """Locks an open folder until it is closed.

    Raises:
        OutputError: if another process has locked it.
    """
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"Another `abliterator bake` is at work in {out}. Wait until it ends, or choose "
                "another --out."
            ) from error
        except OSError:
            pass  # a file system without locks
