"""SHA-256 of a checkpoint's files, streamed, and remembered while the files stay the same."""

from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path

from abliterator.checkpoint._carry import carried_files
from abliterator.checkpoint._folder import Checkpoint
from abliterator.files import readable, write_text_atomic

_HEX64 = re.compile(r"[0-9a-f]{64}")
_SETTLED_NS = 2_000_000_000  # a file just written may change again within one tick of its clock


def fingerprint(checkpoint: Checkpoint, *, cache: Path | None = None) -> dict[str, str]:
    """SHA-256 (hex) of every weight file and every carried file, by path relative to the folder.

    `cache` is a JSON file that remembers the hash of a file for as long as its path, size and times
    are the same; it is made when missing and ignored when unreadable. In a Hugging Face cache, a
    large file is a link to a blob that is named by its SHA-256: that name is taken at its word, and
    costs nothing.

    Raises:
        CheckpointError: a file cannot be read, or the cache cannot be written.
    """
    remembered = _load(cache)
    current: dict[str, dict[str, int | str]] = {}
    hashes = {}
    for file in (*checkpoint.weight_files, *carried_files(checkpoint.folder)[0]):
        path = checkpoint.folder / file
        with readable(path):
            hashes[file] = _blob_name(path) or _hash(path, remembered, current)
    merged = remembered | current
    if cache is not None and merged != remembered:
        write_text_atomic(cache, json.dumps(merged, indent=1) + "\n")
    return hashes


def _blob_name(path: Path) -> str | None:
    target = path.resolve()
    in_hub_cache = path.is_symlink() and target.parent.name == "blobs"
    return target.name if in_hub_cache and _HEX64.fullmatch(target.name) else None


def _hash(
    path: Path, remembered: dict[str, object], current: dict[str, dict[str, int | str]]
) -> str:
    target = path.resolve()
    status = target.stat()
    # With the change time, because a restored archive can give other bytes the same size and mtime.
    key = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns}
    known = remembered.get(str(target))
    if (
        isinstance(known, dict)
        and known.items() >= key.items()
        and isinstance(known.get("sha256"), str)
    ):
        digest = known["sha256"]
    else:
        with target.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if time.time_ns() - max(key["mtime_ns"], key["ctime_ns"]) > _SETTLED_NS:
        current[str(target)] = {**key, "sha256": digest}
    return str(digest)


def _load(cache: Path | None) -> dict[str, object]:
    if cache is None:
        return {}
    try:
        value = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}  # a cache that cannot be read only costs the hashing again
    return value if isinstance(value, dict) else {}
