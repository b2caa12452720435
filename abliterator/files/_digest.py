"""SHA-256 of bytes, files, ranges of files, and JSON values."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

from abliterator.files._read import OpenFile, open_regular, opened_again, read_fully, readable

_CHUNK = 256 << 10  # bytes: a chunk is hashed while it is still in the processor's cache


def sha256_of_bytes(data: bytes | bytearray | memoryview) -> str:
    """SHA-256 (hex) of bytes in memory."""
    return hashlib.sha256(data).hexdigest()


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of a JSON value in canonical form: sorted keys, no spaces, ASCII only."""
    return sha256_of_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def sha256_of_file(path: Path) -> str:
    """SHA-256 (hex) of a regular file's bytes, streamed.

    Raises:
        FileError: it is missing, no regular file, or unreadable.
    """
    with open_regular(path) as source, readable(path):
        return hashlib.file_digest(source.stream, "sha256").hexdigest()


def sha256_of_lines(path: Path) -> str:
    """SHA-256 (hex) of a text file's bytes, with CRLF at the end of a line read as LF.

    For formats in which that is the same, as git and Windows' editors may write either.

    Raises:
        FileError: it is missing, no regular file, or unreadable.
    """
    digest = hashlib.sha256()
    with open_regular(path) as source, readable(path), io.BufferedReader(source.stream) as lines:
        for line in lines:
            digest.update(line[:-2] + b"\n" if line.endswith(b"\r\n") else line)
    return digest.hexdigest()


def sha256_of_range(file: OpenFile, start: int, size: int) -> str:
    """SHA-256 (hex) of `size` bytes of a file from byte `start`.

    They are read through a stream opened for this call, so that threads can share `file`.

    Raises:
        FileError: the file cannot be read, or ends before.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(_CHUNK, size)))
    with opened_again(file) as reader:
        reader.stream.seek(start)
        for done in range(0, size, _CHUNK):
            part = buffer[: size - done]
            read_fully(reader, part)
            digest.update(part)
    return digest.hexdigest()
