"""Checks that a downloaded folder holds regular files only, of sizes that can be read."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from abliterator.errors import FileError
from abliterator.files._read import readable, shown
from abliterator.files._text import too_large

# Subfolders of a model whose content no loader opens, beside those that begin with a dot.
_NEVER_ENTERED = ("original", "__pycache__")

# Bytes of what loaders read into memory, at most: several times the largest of public models. Of
# several patterns the first counts; no loader reads whole what fits none.
_MAX_BYTES = {
    "*.jinja": 4 << 20,
    "*config*.json": 16 << 20,
    "added_tokens.json": 16 << 20,
    "special_tokens_map.json": 16 << 20,
    "chat_template*.json": 16 << 20,
    "*.json": 128 << 20,
    "*.py": 16 << 20,
    **dict.fromkeys(("*.txt", "*.model", "*.tiktoken", "*.spm", "*.codes", "*.vocab"), 128 << 20),
}
_BLOB = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")  # how the Hub's cache calls the content of a file


def require_plain_folder(folder: Path, *, but: str = "") -> None:
    """Checks that a model's folder holds regular files and folders only, none of them too large.

    A link is followed where it stays in the folder, or is one of the Hub's cache, from
    `snapshots/COMMIT` to `blobs`. A link that leads nowhere is left to whoever needs the file.
    Folders that begin with a dot, and `original`, are not entered.

    Args:
        folder: the model's.
        but: files of a name that fits this pattern are left to another check.

    Raises:
        FileError: for a link that leaves the folder, a pipe, a device or a socket, and a file that
            loaders would read into memory and is too large for that.
    """
    with readable(folder):
        root = folder.resolve()
        for path in walk(folder):
            if path.exists() and not fnmatchcase(path.name, but):
                _check_link(folder, path, root)
                _check_kind(folder, path)


def require_regular_files(paths: Iterable[Path]) -> None:
    """Checks that each path is a regular file and no link.

    Raises:
        FileError: for the first that is something else, or missing.
    """
    for path in paths:
        with readable(path):
            if not stat.S_ISREG(path.lstat().st_mode):
                raise FileError(
                    f"{path} is a link, a pipe or something else that is no regular file; only "
                    "files that lie in the folder themselves are expected there. Remove it, and "
                    "make the folder again."
                )


def walk(folder: Path) -> Iterator[Path]:
    """All files and folders of a model; those that `is_closed` names without their content.

    Raises:
        OSError: for a folder that may not be read, which `os.walk` would pass over.
    """

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=fail):
        yield from (Path(parent, name) for name in folders + names)
        folders[:] = [name for name in folders if not is_closed(Path(parent, name))]


def is_closed(folder: Path) -> bool:
    """Whether a subfolder of a model is not entered: for its name, or because it is a link."""
    name = folder.name
    return name.startswith(".") or name in _NEVER_ENTERED or folder.is_symlink()


def _path_text(folder: Path, path: Path) -> str:
    """A path for a message, with the names inside the folder escaped."""
    return f"{folder}{os.sep}{shown(path.relative_to(folder))}"


def _check_link(folder: Path, path: Path, root: Path) -> None:
    if not path.is_symlink():
        return
    target = path.resolve()
    in_cache = (
        root.parent.name == "snapshots"
        and target.parent == (root.parent.parent / "blobs").resolve()
        and _BLOB.fullmatch(target.name)
    )
    if not (in_cache or target.is_relative_to(root)):
        raise FileError(
            f"{_path_text(folder, path)} is a link to {shown(target)}, which is outside of "
            "the model's folder; what is there would be read, copied and published with the model. "
            "Only links inside the folder, and those of the Hugging Face cache, are followed: put "
            "the file itself in place of the link, or remove it."
        )


def _check_kind(folder: Path, path: Path) -> None:
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        return
    if not stat.S_ISREG(status.st_mode):
        raise FileError(
            f"{_path_text(folder, path)} is not a regular file (a pipe, a device or a socket); a "
            "model's folder with files only was expected. Remove it, or download the model again."
        )
    limit = next((n for name, n in _MAX_BYTES.items() if fnmatchcase(path.name, name)), None)
    if limit is not None and status.st_size > limit:
        raise too_large(Path(_path_text(folder, path)), status.st_size, limit)
