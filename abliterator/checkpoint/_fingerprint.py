"""SHA-256 of every file of a checkpoint that a loader needs."""

from __future__ import annotations

import re
from pathlib import Path

from abliterator.checkpoint._auxiliary import auxiliary_files
from abliterator.checkpoint._folder import Checkpoint
from abliterator.files import FileHashes, readable

_HEX64 = re.compile(r"[0-9a-f]{64}")


def fingerprint(checkpoint: Checkpoint, *, cache: Path | None = None) -> dict[str, str]:
    """SHA-256 (hex) of every weight file and every auxiliary file, by path relative to the folder.

    In a Hugging Face cache, a large file is a link to a blob that is named by its SHA-256: that
    name is trusted, and the file is not read.

    Args:
        checkpoint: the folder.
        cache: JSON file that remembers hashes, as `FileHashes` has it; made when missing.

    Raises:
        FileError: a file cannot be read, or the cache cannot be written.
    """
    hashes = FileHashes(cache)
    digests = {}
    for file in (*checkpoint.weight_files, *auxiliary_files(checkpoint.folder)[0]):
        path = checkpoint.folder / file
        with readable(path):
            blob = _blob_name(path)
        digests[file] = blob or hashes.sha256(path)
    hashes.save()
    return digests


def _blob_name(path: Path) -> str | None:
    target = path.resolve()
    in_hub_cache = path.is_symlink() and target.parent.name == "blobs"
    return target.name if in_hub_cache and _HEX64.fullmatch(target.name) else None
