"""SHA-256 of files and of JSON values."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from abliterator.files._read import open_regular, readable


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of a JSON value in canonical form: sorted keys, no spaces, ASCII only."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_of_file(path: Path) -> str:
    """SHA-256 (hex) of a regular file's bytes, streamed.

    Raises:
        FileError: it is missing, no regular file, or unreadable.
    """
    with open_regular(path) as source, readable(path):
        return hashlib.file_digest(source.stream, "sha256").hexdigest()
