"""Writes a weight file with some of its tensors edited and every other byte copied.

As a rule an edit keeps dtype and shape, so no offset moves; where tensors change them, a
`ShardLayout` says where each tensor goes. Every byte is written once, and memory holds the largest
edited tensor once for each thread. To copy the whole file and then write over the edited tensors
would write those twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from abliterator.checkpoint._header import TensorInfo
from abliterator.checkpoint._shard_layout import ShardLayout
from abliterator.checkpoint._threads import FileThreads
from abliterator.files import (
    OpenFile,
    copy_range,
    damaged,
    open_regular,
    opened_again,
    read_fully,
    refuse_same_file,
    replacing,
    sha256_of_range,
    write_fully,
)

TensorEditor = Callable[[TensorInfo, memoryview], memoryview | None]
"""Changes one tensor's bytes in place, or returns others where the tensor gets another dtype or
shape. A later tensor gets the same buffer: keep no part of it."""

_COPIED = 256 << 20  # bytes copied between two checks of whether the work is of use


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
    threads: FileThreads | None = None,
) -> PatchedFile:
    """Write `source` to `destination` with `edit` applied to the bytes of each of `tensors`.

    The header and every other tensor are copied as they are. `destination` appears when all of it
    is on the disk; when anything is raised, by `edit` too, no trace of it stays. The hashes are of
    the bytes in the two files, read again from the system's cache.

    Args:
        source: The base's safetensors file. It is only read.
        destination: Another file; its folder is made if needed, an older file is replaced.
        tensors: Tensors of this file, from `Checkpoint.tensors`, in any order.
        edit: Changes a writable buffer of `info.nbytes` bytes in place, or returns others; several
            threads call it at once if there are any.
        layout: Header and order of the new file, if they are not the base's.
        threads: Edit tensors; without them all is done by the caller's thread.

    Raises:
        CheckpointError: the source cannot be read or has become shorter since it was opened, or
            the destination cannot be written.
    """
    refuse_same_file(source, destination)
    ordered = _in_file_order(tensors)
    with open_regular(source) as base:
        if ordered and ordered[-1].end > base.size:
            raise damaged(source, f"it has become shorter since it was opened: {base.size} bytes")
        size = base.size if layout is None else layout.size
        largest = max((info.nbytes for info in ordered), default=0)
        with replacing(destination, size) as out:
            if layout is not None:
                write_fully(out, memoryview(layout.header))
            patch = _TensorPatch(base, out, edit, threads or FileThreads(), largest)
            patched = _carried_out(_steps(base.size, ordered, layout), patch)
    return PatchedFile(destination, size, patched)


class _Copy(NamedTuple):
    """Bytes `start` to `end` of the base, at `to`."""

    start: int
    end: int
    to: int

    def parts(self) -> Iterator[_Copy]:
        """The same bytes in parts that take a fraction of a second each."""
        for start in range(self.start, self.end, _COPIED):
            yield _Copy(start, min(start + _COPIED, self.end), self.to + start - self.start)


_Step = _Copy | tuple[TensorInfo, TensorInfo]


@dataclass(frozen=True)
class _TensorPatch:
    """Edits one tensor of a file at a time, through streams of its own.

    Attributes:
        base: the base's file.
        out: the new one.
        edit: changes the bytes.
        threads: where it runs, with the buffers.
        largest: bytes of the largest tensor.
    """

    base: OpenFile
    out: OpenFile
    edit: TensorEditor
    threads: FileThreads
    largest: int

    def __call__(self, old: TensorInfo, new: TensorInfo) -> PatchedTensor:
        with (
            self.threads.buffer(self.largest) as buffer,
            opened_again(self.base) as source,
            opened_again(self.out, "r+b") as target,
        ):
            self.threads.check()
            part = buffer[: old.nbytes]
            source.stream.seek(old.start)
            read_fully(source, part)
            target.stream.seek(new.start)
            # not bound to a name, so that it is gone before the next one is made
            write_fully(target, self.edit(old, part) or part)
        return PatchedTensor(
            old.name,
            sha256_of_range(self.base, old.start, old.nbytes),
            sha256_of_range(self.out, new.start, new.nbytes),
        )


def _carried_out(steps: Iterable[_Step], patch: _TensorPatch) -> tuple[PatchedTensor, ...]:
    """Copies in this thread while tensors are edited in others; when it returns, none is."""
    edits: list[Future[PatchedTensor]] = []
    try:
        for step in steps:
            if isinstance(step, _Copy):
                for part in step.parts():
                    patch.threads.check()
                    copy_range(patch.base, patch.out, *part)
            else:
                edits.append(patch.threads.start(patch, *step))
        return tuple(edit.result() for edit in edits)
    finally:
        for edit in edits:
            edit.cancel()
        wait(edits)


def _steps(size: int, ordered: list[TensorInfo], layout: ShardLayout | None) -> Iterator[_Step]:
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
