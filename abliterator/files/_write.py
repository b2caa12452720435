"""Atomic writes: under a temporary name, flushed to the disk, then renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from abliterator.errors import FileError
from abliterator.files._read import OpenFile, damaged, open_regular, readable

_NAME_BYTES = 255  # of a file's name, at most, on most file systems
# What no file name may hold on one of the systems, with the sign that stands for it.
_NOT_IN_NAMES = re.compile(r'[%<>:"/\\|?*\x00-\x1f]')
# Names of devices on Windows, whatever follows a dot.
_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[1-9¹²³])(?= *(\.|$))", re.I)
_CHUNK = 8 << 20  # bytes per read and write where the kernel cannot copy by itself
_NOT_HERE = {
    errno.EXDEV,  # between two file systems, on kernels before 5.3
    errno.ENOSYS,
    errno.EINVAL,
    errno.EOPNOTSUPP,
    errno.EPERM,  # a container's system call filter
}


@contextmanager
def replacing(destination: Path, size: int, *, is_durable: bool = True) -> Iterator[OpenFile]:
    """A new file of `size` bytes that replaces `destination` unless the block raises.

    Where it is durable, it also outlives a loss of power, for which the disk has to be waited for;
    else it is only sure to outlive the process.

    It is called `partial_of(destination)` until then, and is removed when anything is raised. A
    disk without space for it is an error before the work. (Not by posix_fallocate: where a file
    system cannot reserve space, as on many network volumes, the C library writes to every block.)
    """
    free = free_bytes(destination)
    if size > free:
        raise _no_space(destination, size, free)
    partial = partial_of(destination)
    try:
        with writable(destination, size):
            destination.parent.mkdir(parents=True, exist_ok=True)
            partial.unlink(missing_ok=True)  # of a run that was killed
            stream = partial.open("xb", buffering=0)
        with stream:
            yield OpenFile(destination, stream, size)
            if is_durable:
                with writable(destination, size):
                    os.fsync(stream.fileno())
        with writable(destination, size):
            partial.replace(destination)
            if is_durable:
                _sync_folder(destination.parent)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def partial_of(destination: Path) -> Path:
    """The name of a file until it is complete; a run that is killed may leave it."""
    name = f".{destination.name}.partial"
    if len(os.fsencode(name)) > _NAME_BYTES:  # the file's own name may be as long as names can be
        digest = hashlib.sha256(os.fsencode(destination.name)).hexdigest()
        name = f".{digest}.partial"
    return destination.with_name(name)


def portable_name(text: str, suffix: str) -> str:
    """A file name for a text that every system allows; different for different texts.

    What a system does not allow is written as in addresses: "a:b" becomes "a%3Ab".
    """
    name = _NOT_IN_NAMES.sub(lambda match: f"%{ord(match[0]):02X}", text)
    if _DEVICE.match(name):
        name = f"%{ord(name[0]):02X}{name[1:]}"
    return name + suffix


def copy_file(source: Path, destination: Path) -> int:
    """Copy one file's bytes, never as a link; returns its size in bytes.

    Raises:
        FileError: the source cannot be read or the destination cannot be written.
    """
    refuse_same_file(source, destination)
    with open_regular(source) as base, replacing(destination, base.size) as out:
        copy_range(base, out, 0, base.size, 0)
    return base.size


def link_file(source: Path, destination: Path) -> None:
    """Makes `destination` a file with the bytes of `source`, without a copy where possible.

    A symbolic link; where the system makes none, as Windows without its developer mode, a hard
    link; and on another disk than the source, a copy. `destination` is only to be read, and does
    not exist yet.

    Raises:
        FileError: it has to be a copy, and the source cannot be read or the copy be written.
    """
    with suppress(OSError, NotImplementedError):
        destination.symlink_to(source.resolve())
        return
    if sys.platform == "win32":  # elsewhere a new hard link changes the times of the source
        with suppress(OSError):
            destination.hardlink_to(source.resolve())
            return
    copy_file(source, destination)


def write_bytes_atomic(path: Path, data: bytes, *, is_durable: bool = True) -> None:
    """Write `data` to `path`: afterwards the file has all of it, or is as it was (`replacing`)."""
    with replacing(path, len(data), is_durable=is_durable) as out:
        write_fully(out, memoryview(data))


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8: afterwards the file has all of it, or is as it was."""
    write_bytes_atomic(path, text.encode("utf-8"))


def free_bytes(path: Path) -> int:
    """Bytes that may still be written to `path`, or to where it would be if it were made."""
    existing = path.absolute()
    with readable(existing):
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        return shutil.disk_usage(existing).free


def refuse_same_file(source: Path, destination: Path) -> None:
    """Refuses a destination that is the source file, also under another path or link."""
    with readable(source):
        if destination.exists() and source.exists() and source.samefile(destination):
            raise FileError(
                f"{destination} is the file that would be read ({source}); an output folder of "
                "its own was expected. Choose another output folder."
            )


def copy_range(source: OpenFile, out: OpenFile, start: int, end: int, to: int) -> None:
    """Copy bytes to the place `to` of `out`, in the kernel where possible.

    Both streams end after what was copied.
    """
    at, shift = start, to - start
    with writable(out.path, out.size):
        while at < end and (copied := _kernel_copy(source, out, at, at + shift, end - at)):
            at += copied
    source.stream.seek(at)
    out.stream.seek(at + shift)
    buffer = memoryview(bytearray(min(_CHUNK, end - at)))
    while at < end:
        with readable(source.path):
            count = source.stream.readinto(buffer[: end - at])
        if not count:
            raise damaged(source.path, f"it ended {end - at} bytes early while it was copied")
        write_fully(out, buffer[:count])
        at += count


def write_fully(out: OpenFile, data: memoryview) -> None:
    """Write all of `data` at the current position; one call may write less, so it is repeated."""
    done = 0
    with writable(out.path, out.size):
        while done < len(data):
            done += out.stream.write(data[done:])


@contextmanager
def writable(destination: Path, size: int) -> Iterator[None]:
    """Turn a refusal of the operating system to write `size` bytes into a FileError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_space(destination, size, free_bytes(destination)) from error
        raise FileError(
            f"{destination} cannot be written: {error.strerror or error}. Choose an output folder "
            "that you may write to."
        ) from error


def _no_space(destination: Path, size: int, free: int) -> FileError:
    return FileError(
        f"There is no room for {destination}: it needs {size:,} bytes, {free:,} are free there. "
        "Free some space, or choose an output folder on another disk."
    )


def _kernel_copy(source: OpenFile, out: OpenFile, at: int, to: int, count: int) -> int:
    """Copy up to `count` bytes inside the kernel; 0 where it does not support that."""
    if not hasattr(os, "copy_file_range"):
        return 0
    try:
        descriptors = source.stream.fileno(), out.stream.fileno()
        copied: int = os.copy_file_range(*descriptors, count, at, to)
    except OSError as error:
        if error.errno in _NOT_HERE:
            return 0
        raise
    return copied


def _sync_folder(folder: Path) -> None:
    """Make a rename durable: without it, a power cut can restore the old file."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
