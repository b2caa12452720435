"""The files of a plan: the bytes that were verified are the bytes that are uploaded.

Small files are read once, compared with the hash of the verification, and held in memory until they
are sent. Large ones stay on the disk, identified by the hash of the verification and by size and
times in the file system, which a later change alters.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

from pydantic import Field

from abliterator.errors import PublishError
from abliterator.files import open_regular, readable, require_regular_files, sha256_of_bytes
from abliterator.record import Frozen

HELD_BYTES = 16 << 20
"""Size up to which a file is held in memory; the Hub stores any file above 10 MB as a large one."""

Stamp: TypeAlias = tuple[tuple[int, ...], ...]
"""Size and times of a path and of what it links to: a write or a rename changes the last (ctime).

Inode numbers are no part of it: some network file systems give a file another one now and then.
"""


class PlannedFile(Frozen):
    """One file to be uploaded.

    Attributes:
        path: where it goes in the repository.
        size: in bytes.
        sha256: of the bytes that were verified.
        content: these bytes, or the path of a file that is too large to be held.
        stamp: of that path when it was verified; None of bytes.
    """

    path: str
    size: int
    sha256: str
    content: Path | bytes = Field(exclude=True)
    stamp: Stamp | None = Field(None, exclude=True)

    @property
    def git_blob(self) -> str | None:
        """Git's hash of the content, which the Hub stores for small files; None for a large file.

        Large are the files that are not held in memory: the Hub stores none of them as a small one.
        """
        if isinstance(self.content, Path):
            return None
        return hashlib.sha1(b"blob %d\0" % self.size + self.content).hexdigest()


def stamp_of(path: Path) -> Stamp:
    """The stamp of a path; () for a path that does not exist."""
    try:
        statuses = path.lstat(), path.stat()
    except OSError:
        return ()
    return tuple((s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in statuses)


def stamps_of(folder: Path) -> dict[str, Stamp]:
    """The stamps of all files of a folder, by path in it."""
    with readable(folder):
        paths = [Path(parent) / name for parent, _, names in os.walk(folder) for name in names]
    return {path.relative_to(folder).as_posix(): stamp_of(path) for path in paths}


def verified_files(
    folder: Path, sha256: Mapping[str, str], before: Mapping[str, Stamp]
) -> list[PlannedFile]:
    """The verified files of a folder; the bytes of small ones are held in memory.

    Args:
        folder: what was verified.
        sha256: of each file that belongs to it, as verified.
        before: the stamps of the folder's files from before the verification.

    Raises:
        PublishError: if a file is no longer what was verified, or changed while it was.
    """
    files = [_verified(folder / path, path, digest) for path, digest in sorted(sha256.items())]
    require_unchanged({folder / path: before.get(path, ()) for path in sha256})
    return files


def _verified(location: Path, path: str, digest: str) -> PlannedFile:
    require_regular_files([location])
    stamp = stamp_of(location)
    with open_regular(location) as source, readable(location):
        if source.size > HELD_BYTES:
            return PlannedFile(
                path=path, size=source.size, sha256=digest, content=location, stamp=stamp
            )
        content = source.stream.readall()
    if sha256_of_bytes(content) != digest:
        raise changed([location])
    return PlannedFile(path=path, size=len(content), sha256=digest, content=content)


def require_unchanged(stamps: Mapping[Path, Stamp]) -> None:
    """Raises PublishError if a file has another stamp than it had."""
    paths = [path for path, stamp in stamps.items() if stamp_of(path) != stamp]
    if paths:
        raise changed(paths)


def changed(paths: Iterable[Path]) -> PublishError:
    """The error for files that are not what was verified."""
    names = ", ".join(map(str, paths))
    return PublishError(
        f"{names} changed after it was verified, or while it was; a folder that nothing writes to "
        "was expected. What would be uploaded is no longer what was verified, so nothing more was "
        "sent. Run the same command again when the folder is at rest."
    )
