"""A cache of SHA-256 digests of files, valid while path, size and times stay the same."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import ClassVar

from abliterator.errors import FileError
from abliterator.files._digest import sha256_of_file
from abliterator.files._read import readable
from abliterator.files._text import read_text
from abliterator.files._write import write_text_atomic


class FileHashes:
    """SHA-256 (hex) of files; a file is read again only when its path, size or times change.

    Args:
        cache: JSON file that `save` writes; ignored when unreadable, which costs the hashing again.
            Without it, hashes are remembered as long as this object.
        least: bytes of a file from which on it is remembered at all.
    """

    SETTLED_NS: ClassVar = 2_000_000_000
    """Age of a file that is remembered: a younger one may change within one tick of its clock."""

    def __init__(self, cache: Path | None, *, least: int = 0) -> None:
        self._cache, self._least = cache, least
        self._entries: dict[str, object] | None = None  # read when first needed
        self._changed = False

    def sha256(self, path: Path) -> str:
        """The hash of a regular file's bytes.

        Raises:
            FileError: it is missing, no regular file, or unreadable.
        """
        entries = self._load()
        with readable(path):
            target = path.resolve()
            status = target.stat()
        # With the change time: a restored archive can give other bytes the same size and mtime.
        times = {"mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns}
        key: dict[str, object] = {"size": status.st_size, **times}
        entry = entries.get(str(target))
        if isinstance(entry, dict) and entry.items() >= key.items():
            digest = entry.get("sha256")
            if isinstance(digest, str):
                return digest
        digest = sha256_of_file(target)
        settled = time.time_ns() - max(times.values()) > self.SETTLED_NS
        if settled and status.st_size >= self._least:
            entries[str(target)] = {**key, "sha256": digest}
            self._changed = True
        return digest

    def save(self) -> None:
        """Writes what is new to the cache file.

        Raises:
            FileError: it cannot be written.
        """
        if self._cache is None or not self._changed:
            return
        merged = _read(self._cache) | self._load()
        write_text_atomic(self._cache, json.dumps(merged, indent=1) + "\n")
        self._changed = False

    def _load(self) -> dict[str, object]:
        if self._entries is None:
            self._entries = {} if self._cache is None else _read(self._cache)
        return self._entries


def _read(cache: Path) -> dict[str, object]:
    try:
        value = json.loads(read_text(cache))
    except (FileError, ValueError, RecursionError):
        return {}  # a cache that cannot be read only costs the hashing again
    return value if isinstance(value, dict) else {}
