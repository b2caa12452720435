"""Writes a weight file with some of its tensors edited and every other byte copied.

As a rule an edit keeps dtype and shape, so no offset moves; where tensors change them, a
`ShardLayout` says where each tensor goes. Every byte is written once, and memory holds the largest
edited tensor once. To copy the whole file and then write over the edited tensors would write those
twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from abliterator.checkpoint._header import TensorInfo
from abliterator.checkpoint._shard_layout import ShardLayout
from abliterator.files import (
    copy_range,
    damaged,
    open_regular,
    read_fully,
    refuse_same_file,
    replacing,
    sha256_of_range,
    write_fully,
)

TensorEditor = Callable[[TensorInfo, memoryview], memoryview | None]
"""Changes one tensor's bytes in place, or returns others where the tensor gets another dtype or
shape. The next tensor gets the same buffer: keep no part of it."""


@dataclass(frozen=True)
class PatchedTensor:
    """An edited tensor, with the SHA-256 (hex) of its bytes before and after."""

    name: str
    sha256_before: str
    sha256_after: str


@dataclass(frozen=True)
class PatchedFile:
    """A file that was written: its size in bytes, and its edited tensors in file order."""

    path: Path
    size: int
    tensors: tuple[PatchedTensor, ...]


def patch_file(
    source: Path,
    destination: Path,
    tensors: Iterable[TensorInfo],
    edit: TensorEditor,
    *,
    layout: ShardLayout | None = None,
) -> PatchedFile:
    """Write `source` to `destination` with `edit` applied to the bytes of each of `tensors`.

    The header and every other tensor are copied as they are. `destination` appears when all of it
    is on the disk; when anything is raised, by `edit` too, no trace of it stays. The hashes are of
    the bytes in the two files, read again from the system's cache by other threads.

    Args:
        source: The base's safetensors file. It is only read.
        destination: Another file; its folder is made if needed, an older file is replaced.
        tensors: Tensors of this file, from `Checkpoint.tensors`, in any order.
        edit: Changes a writable buffer of `info.nbytes` bytes in place, or returns others.
        layout: Header and order of the new file, if they are not the base's.

    Raises:
        CheckpointError: the source cannot be read or has become shorter since it was opened, or
            the destination cannot be written.
    """
    refuse_same_file(source, destination)
    ordered = _in_file_order(tensors)
    buffer = memoryview(bytearray(max((info.nbytes for info in ordered), default=0)))
    with open_regular(source) as base, ThreadPoolExecutor(2) as hashing:
        if ordered and ordered[-1].end > base.size:
            raise damaged(source, f"it has become shorter since it was opened: {base.size} bytes")
        size = base.size if layout is None else layout.size
        with replacing(destination, size) as out:
            hashes = []
            if layout is not None:
                write_fully(out, memoryview(layout.header))
            for step in _steps(base.size, ordered, layout):
                if isinstance(step, _Copy):
                    copy_range(base, out, *step)
                    continue
                old, new = step
                part = buffer[: old.nbytes]
                base.stream.seek(old.start)
                read_fully(base, part)
                out.stream.seek(new.start)
                # not bound to a name, so that it is gone before the next one is made
                write_fully(out, edit(old, part) or part)
                copies = (base, old), (out, new)
                digests = [hashing.submit(sha256_of_range, f, i.start, i.nbytes) for f, i in copies]
                hashes.append((old, digests))
            patched = tuple(
                PatchedTensor(old.name, *(digest.result() for digest in digests))
                for old, digests in hashes
            )
    return PatchedFile(destination, size, patched)


class _Copy(NamedTuple):
    """Bytes `start` to `end` of the base, at `to`."""

    start: int
    end: int
    to: int


def _steps(
    size: int, ordered: list[TensorInfo], layout: ShardLayout | None
) -> Iterator[_Copy | tuple[TensorInfo, TensorInfo]]:
    """The writes in file order: ranges copied from the base, and edited tensors (old, new)."""
    if layout is None:
        at = 0
        for info in ordered:
            yield _Copy(at, info.start, at)
            yield info, info
            at = info.end
        yield _Copy(at, size, at)
        return
    edited = {info.name for info in ordered}
    for old, new in layout.tensors:
        yield (old, new) if old.name in edited else _Copy(old.start, old.end, new.start)


def _in_file_order(tensors: Iterable[TensorInfo]) -> list[TensorInfo]:
    ordered = sorted(tensors, key=lambda info: (info.start, info.end))
    for first, second in pairwise(ordered):
        if second.start < first.end:
            raise ValueError(f"{first.name} and {second.name} overlap: was one given twice?")
    return ordered
