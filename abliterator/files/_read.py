"""Opens regular files for reading; errors for paths that are no file, and for damaged files."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Literal, NamedTuple

from abliterator.errors import FileError


class OpenFile(NamedTuple):
    """An unbuffered file with its name for messages; `size` is its bytes, now or when complete."""

    path: Path
    stream: FileIO
    size: int


@contextmanager
def open_regular(path: Path) -> Iterator[OpenFile]:
    """Open a regular file, or a link to one, for reading.

    Raises:
        FileError: it is missing, a broken link, something else than a file, or unreadable.
    """
    with readable(path):
        if not path.is_file():  # checked before opening: to open a named pipe would block for ever
            raise FileError(_not_a_file(path))
        stream = path.open("rb", buffering=0)
    with stream:
        yield OpenFile(path, stream, os.fstat(stream.fileno()).st_size)


@contextmanager
def opened_again(file: OpenFile, mode: Literal["rb", "r+b"] = "rb") -> Iterator[OpenFile]:
    """The same file through a stream of its own, so that threads share no position in it."""
    with readable(file.path):
        stream = Path(file.stream.name).open(mode, buffering=0)  # noqa: SIM115
    with stream:
        yield file._replace(stream=stream)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn an operating system's refusal to read `path` into a FileError."""
    try:
        yield
    except OSError as error:
        raise FileError(
            f"{path} cannot be read: {error.strerror or error}. Check that it exists and that you "
            "may read it."
        ) from error


def require_utf8_name(path: Path) -> None:
    """Refuse a path whose bytes on the disk are not its text in UTF-8.

    safetensors and tokenizers take every path as UTF-8. Where the bytes are not, or the locale's
    encoding is another, they would miss the file, or write to another one.

    Raises:
        FileError: for such a path.
    """
    try:
        if os.fsencode(path) == str(path).encode():
            return
    except UnicodeEncodeError:
        pass
    raise FileError(
        f"The path {shown(path)} is not UTF-8 on this system (file names are read as "
        f"{sys.getfilesystemencoding()}), which the libraries that read weights expect. Rename it "
        "in plain letters, or run in a UTF-8 locale (LC_ALL=C.UTF-8)."
    )


def read_fully(source: OpenFile, buffer: memoryview) -> None:
    """Fill `buffer` from the current position; one call reads 2 GiB at most, so it is repeated."""
    done = 0
    with readable(source.path):
        while done < len(buffer):
            count = source.stream.readinto(buffer[done:])
            if not count:
                missing = len(buffer) - done
                raise damaged(source.path, f"it ended {missing} bytes early while it was read")
            done += count


def damaged(path: Path, fault: str) -> FileError:
    """The error for a file whose content cannot be right."""
    return FileError(
        f"{path} is damaged: {fault}. A sound checkpoint was expected; download or save it again, "
        "and compare its size with the original's."
    )


def shown(text: object) -> str:
    """A value from a file for a message: escaped, one line of at most 120 characters."""
    line = str(text)
    if not (line.isprintable() and line):
        line = ascii(line)
    return line if len(line) <= 120 else line[:119] + "…"


def _not_a_file(path: Path) -> str:
    if path.is_symlink() and not path.exists():
        return (
            f"{path} is a link to a file that is not there. If this is a Hugging Face cache, part "
            "of it was deleted: download the model again."
        )
    fault = "is not a regular file" if path.exists() else "is missing"
    return (
        f"{path} {fault}; a regular file was expected there. If it belongs to a checkpoint, "
        "download that again, all files of it."
    )
