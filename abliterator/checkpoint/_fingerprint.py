"""SHA-256 of files, streamed, and remembered while the files stay the same."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

from abliterator.checkpoint._carry import carried_files
from abliterator.checkpoint._folder import Checkpoint
from abliterator.errors import FileError
from abliterator.files import read_text, readable, sha256_of_file, write_text_atomic

_HEX64 = re.compile(r"[0-9a-f]{64}")
_SETTLED_NS = 2_000_000_000  # a file just written may change again within one tick of its clock


class FileHashes:
    """SHA-256 (hex) of files; a file is read again only when its path, size or times change.

    Args:
        cache: JSON file that `save` writes; ignored when unreadable, which costs the hashing again.
            Without it, hashes are remembered as long as this object.
        least: bytes of a file from which on it is remembered at all.
    """

    def __init__(self, cache: Path | None, *, least: int = 0) -> None:
        self._cache, self._least = cache, least
        self._known: dict[str, object] | None = None  # read when first needed
        self._changed = False

    def sha256(self, path: Path) -> str:
        """The hash of a regular file's bytes.

        Raises:
            FileError: it is missing, no regular file, or unreadable.
        """
        known = self._load()
        with readable(path):
            target = path.resolve()
            status = target.stat()
        # With the change time: a restored archive can give other bytes the same size and mtime.
        times = {"mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns}
        key: dict[str, object] = {"size": status.st_size, **times}
        entry = known.get(str(target))
        if isinstance(entry, dict) and entry.items() >= key.items():
            digest = entry.get("sha256")
            if isinstance(digest, str):
                return digest
        digest = sha256_of_file(target)
        settled = time.time_ns() - max(times.values()) > _SETTLED_NS
        if settled and status.st_size >= self._least:
            known[str(target)] = {**key, "sha256": digest}
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
        if self._known is None:
            self._known = {} if self._cache is None else _read(self._cache)
        return self._known


def fingerprint(checkpoint: Checkpoint, *, cache: Path | None = None) -> dict[str, str]:
    """SHA-256 (hex) of every weight file and every carried file, by path relative to the folder.

    In a Hugging Face cache, a large file is a link to a blob that is named by its SHA-256: that
    name is taken at its word, and costs nothing.

    Args:
        checkpoint: the folder.
        cache: JSON file that remembers hashes, as `FileHashes` has it; made when missing.

    Raises:
        FileError: a file cannot be read, or the cache cannot be written.
    """
    hashes = FileHashes(cache)
    found = {}
    for file in (*checkpoint.weight_files, *carried_files(checkpoint.folder)[0]):
        path = checkpoint.folder / file
        with readable(path):
            blob = _blob_name(path)
        found[file] = blob or hashes.sha256(path)
    hashes.save()
    return found


def _blob_name(path: Path) -> str | None:
    target = path.resolve()
    in_hub_cache = path.is_symlink() and target.parent.name == "blobs"
    return target.name if in_hub_cache and _HEX64.fullmatch(target.name) else None


def _read(cache: Path) -> dict[str, object]:
    try:
        value = json.loads(read_text(cache))
    except (FileError, ValueError, RecursionError):
        return {}  # a cache that cannot be read only costs the hashing again
    return value if isinstance(value, dict) else {}
