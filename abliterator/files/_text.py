"""Text files: UTF-8 in every locale, of a bounded size; only a line feed ends a line."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from abliterator.errors import FileError
from abliterator.files._read import damaged, open_regular, readable

_MAX_TEXT_BYTES = 1 << 30  # of a text file that is read whole, at most


def read_text(path: Path, *, max_bytes: int = _MAX_TEXT_BYTES) -> str:
    """The text of a regular file, decoded as UTF-8; a byte order mark is not part of it.

    Line ends stay as they are.

    Raises:
        FileError: it is missing, no regular file, unreadable, too large, or not UTF-8.
    """
    data = read_bytes(path, max_bytes=max_bytes)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise damaged(path, f"byte {error.start} is not UTF-8 text") from None


def read_bytes(path: Path, *, max_bytes: int = _MAX_TEXT_BYTES) -> bytes:
    """The content of a regular file.

    Raises:
        FileError: it is missing, no regular file, unreadable, or too large.
    """
    with open_regular(path) as source, readable(path):
        if source.size > max_bytes:
            raise too_large(path, source.size, max_bytes)
        data = source.stream.read(max_bytes + 1) or b""
    if len(data) > max_bytes:  # it grew since
        raise too_large(path, len(data), max_bytes)
    return data


def read_lines(path: Path) -> list[str]:
    r"""The lines of a JSON Lines file, without blank ones.

    Only "\n" ends a line: `str.splitlines` would also cut at U+2028 and others, which may stand in
    JSON texts as they are.

    Raises:
        FileError: as for `read_text`.
    """
    return [line for line in read_text(path).split("\n") if line.strip()]


def as_lines(texts: Iterable[str]) -> str:
    """The text of a JSON Lines file: each of `texts`, which hold no line feed, on a line."""
    return "".join(f"{text}\n" for text in texts)


def too_large(path: Path, size: int, limit: int) -> FileError:
    """The error for a file that is larger than a file of its kind may be."""
    return FileError(
        f"{path} has {size:,} bytes; at most {limit:,} are expected of such a file. Check that it "
        "is the right one."
    )
