"""Compares every byte of a checkpoint with its base."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from abliterator.anatomy import partial_reason
from abliterator.checkpoint import (
    Checkpoint,
    FileThreads,
    TensorInfo,
    auxiliary_files,
    shard_layout,
)
from abliterator.devices import worker_count
from abliterator.errors import CheckpointError
from abliterator.files import sha256_of_bytes, sha256_of_file
from abliterator.formats import Dequantized, storage_of
from abliterator.record import TensorEdit, Verification
from abliterator.verification._auxiliary import AuxiliaryFileCheck, check_record
from abliterator.verification._findings import (
    EDITS,
    OURS,
    Findings,
    format_leak,
    read_edits,
)
from abliterator.verification._leak import LeakMeter, leak_meter
from abliterator.verification._pairs import PairMeter, pair_meter

_CHUNK = 4 << 20  # bytes compared at once
_SMALL_BYTES = 32 << 20
# Tensors in memory for an edited one of the base: it, the edited one, and it as plain numbers.
_SIDES = 6
_MEASURED_BYTES = 64 << 20  # of a tensor's columns in float64
# Two measurements of one leak differ by the rounding of the sums behind them.
_SAME_LEAK = 0.05
_NO_LEAK = 1e-5


def verify(
    base: Path,
    checkpoint: Path,
    *,
    subspace: Path | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Verification:
    """Compares every byte of an edited checkpoint with its base.

    Where modules have edits of their own (U and V), their tensors are computed again from the base
    and the checkpoint's directions.safetensors. No subspace is measured then, for none is promised
    to be absent.

    Args:
        base: folder of the base model.
        checkpoint: folder of the edited one.
        subspace: safetensors file with the removed subspace Q [H, k], or [L, H, k] with one a
            block; without it the leak is not measured again.
        on_bytes: called with the size of each weight file when it is done.

    Raises:
        CheckpointError: if the base is damaged, or the checkpoint has no readable edits.json. What
            is wrong with the checkpoint's own bytes is a fault, not an error.
    """
    opened, findings = Checkpoint.open(base), Findings()
    named = _named(read_edits(checkpoint), opened, findings)
    dequantized = storage_of(opened.config).dequantized(
        opened.tensors, [edit.name for edit in named.values() if edit.dequantized]
    )
    meter = leak_meter(opened, subspace)
    pairs = pair_meter(opened, checkpoint, named, findings)
    weights = _WeightComparison(opened, checkpoint, named, dequantized, meter, pairs)
    with FileThreads(_workers(opened, named)) as threads:
        compared = threads.of_files(weights.compare, opened.weight_files)
        for file, of_file in zip(opened.weight_files, compared, strict=True):
            findings.add(of_file)
            if on_bytes is not None:
                on_bytes(opened.file_bytes[file])
    auxiliary = auxiliary_files(base)[0]
    check = AuxiliaryFileCheck(opened, checkpoint, dequantized, findings)
    for file in auxiliary:
        check.compare(file)
    check_record(base, checkpoint, named, findings)
    for file in OURS:
        if (checkpoint / file).is_file():
            findings.sha256[file] = sha256_of_file(checkpoint / file)
    of_base = {*opened.weight_files, *auxiliary}
    return Verification(
        faults=tuple(findings.faults),
        tensors=len(opened.tensors),
        edited=len(named),
        identical_bytes=findings.identical_bytes,
        edited_bytes=findings.edited_bytes,
        max_leak=max(findings.leaks, default=None),
        max_apart=max(findings.apart, default=None),
        sha256=findings.sha256,
        foreign=tuple(sorted(files_of(checkpoint) - of_base.union(findings.sha256))),
        partial=partial_reason(opened.config),
    )


def _workers(base: Checkpoint, named: Mapping[str, TensorEdit]) -> int:
    """How many files are compared at once: both sides of an edited tensor are in memory."""
    if base.total_bytes < _SMALL_BYTES:
        return 1  # before other threads would have been started
    largest = max((base.tensors[name].nbytes for name in named), default=0)
    return worker_count(_SIDES * largest + _MEASURED_BYTES)


def _named(
    edits: tuple[TensorEdit, ...], base: Checkpoint, findings: Findings
) -> dict[str, TensorEdit]:
    """The edits by name; a fault for each that does not fit the base."""
    named: dict[str, TensorEdit] = {}
    storage = storage_of(base.config)
    for edit in edits:
        info = base.tensors.get(edit.name)
        if info is None:
            findings.fault(f"{EDITS} names {edit.name}, which the base does not have.")
        elif edit.name in named:
            findings.fault(f"{EDITS} names {edit.name} twice.")
        elif (info.file, info.dtype, info.shape) != (edit.file, edit.dtype, edit.shape):
            findings.fault(
                f"{EDITS} says that {edit.name} is {edit.dtype} {list(edit.shape)} in {edit.file}; "
                f"in the base it is {info.dtype} {list(info.shape)} in {info.file}."
            )
        elif not set(edit.experts or ()) <= set(range(info.shape[0])):
            findings.fault(
                f"{EDITS} names experts {list(edit.experts or ())} of {edit.name}, which has "
                f"{info.shape[0]}."
            )
        elif edit.dequantized and not storage.layout(edit.name, base.tensors).quantized:
            findings.fault(
                f"{EDITS} says that {edit.name} was quantised; in the base it is plain numbers."
            )
        else:
            named[edit.name] = edit
    return named


@dataclass(frozen=True)
class _WeightComparison:
    """Compares the weight files of a checkpoint with the base's; a thread a file may do so.

    Attributes:
        base: the base.
        checkpoint: folder of the edited one.
        named: what edits.json says, by tensor.
        dequantized: what follows from it for tensors that lose their scales.
        meter: measures leaks again; None without a subspace.
        pairs: computes tensors again that have U and V; None where there are none.
        findings: of the file that is compared.
    """

    base: Checkpoint
    checkpoint: Path
    named: Mapping[str, TensorEdit]
    dequantized: Dequantized
    meter: LeakMeter | None
    pairs: PairMeter | None = None
    findings: Findings = field(default_factory=Findings)

    def compare(self, file: str) -> Findings:
        """Findings of one weight file, compared from its header to its last byte."""
        of_file = replace(self, findings=Findings())
        of_file._compare(file)
        return of_file.findings

    def _compare(self, file: str) -> None:
        findings, source, edited = self.findings, self.base.folder / file, self.checkpoint / file
        shard = shard_layout(self.base, file, self.dequantized.dense, self.dequantized.dropped)
        if not edited.is_file():
            findings.fault(f"{file} is missing.")
            return
        if (size := edited.stat().st_size) != shard.size:
            findings.fault(f"{file} has {size} bytes; {shard.size} were expected.")
            return
        with source.open("rb") as first, edited.open("rb") as second:
            pair = _Pair(first, second)
            if not pair.has(shard.header):
                whose = "what the edit makes of the base's" if shard.changed else "the base's"
                findings.fault(f"{file}: the header differs from {whose}.")
            for info, new in shard.tensors:
                if info.name in self.named:
                    self._compare_edited(pair, info, new)
                elif info.name in self.dequantized.layouts:
                    expected = self._numbers(info, new, pair.base(info.start, info.nbytes))
                    if pair.edited(new.nbytes) != expected:
                        findings.fault(f"{file}: {new.name} is not what the base's numbers are.")
                elif not pair.same(info):
                    findings.fault(
                        f"{file}: {info.name} differs from the base's, and {EDITS} does not name "
                        "it."
                    )
        findings.identical_bytes += pair.identical
        findings.base_sha256[file] = (
            sha256_of_file(source) if shard.changed else pair.first.hexdigest()
        )
        findings.sha256[file] = pair.second.hexdigest()

    def _numbers(self, info: TensorInfo, new: TensorInfo, stored: bytearray) -> bytearray:
        """Bytes of a quantised tensor of the base as plain numbers, in the layout of `new`."""
        layout, numbers = self.dequantized.layouts[info.name], bytearray(new.nbytes)
        layout.dequantize(stored, layout.scales_from(self.base.read), numbers)
        return numbers

    def _compare_edited(self, pair: _Pair, info: TensorInfo, new: TensorInfo) -> None:
        """Checks one edited tensor: its hashes on both sides, and its leak."""
        edit, findings = self.named[info.name], self.findings
        if edit.dequantized != (info.name in self.dequantized.layouts):
            findings.fault(
                f"{EDITS} says that {info.name} is still quantised, and of others of its module "
                "that they are not."
            )
            return
        before, after = pair.base(info.start, info.nbytes), pair.edited(new.nbytes)
        findings.edited_bytes += new.nbytes
        if edit.experts is not None:
            others = self._numbers(info, new, before) if edit.dequantized else before
            _compare_other_experts(info, edit, (others, after), findings)
        for side, data, claimed in (
            ("base", before, edit.sha256_before),
            ("edited", after, edit.sha256_after),
        ):
            if sha256_of_bytes(data) != claimed:
                findings.fault(
                    f"{info.file}: the {side} bytes of {info.name} are not those that {EDITS} "
                    f"has the hash of."
                )
        if edit.subspace == "writer":
            if self.pairs is not None:
                self.pairs.compare(edit, before, after, findings)
            return
        if self.meter is None:
            return
        leak = self.meter.leak(info, before, after, edit.experts, dequantized=edit.dequantized)
        findings.leaks += [] if leak is None else [leak]
        if not _agree(leak, edit.leak):
            findings.fault(
                f"{info.file}: {info.name} has a leak of {format_leak(leak)}, measured again; "
                f"{EDITS} says {format_leak(edit.leak)}."
            )


class _Pair:
    """A weight file of base and checkpoint, hashed while both are read.

    The checkpoint's is read from its first byte to its last, and so is the base's unless its
    tensors lie elsewhere; then `first` is of no use.
    """

    def __init__(self, base: BinaryIO, edited: BinaryIO) -> None:
        self._base, self._edited = base, edited
        self.first, self.second = hashlib.sha256(), hashlib.sha256()
        self.identical = 0

    def has(self, header: bytes) -> bool:
        """Whether the checkpoint's file begins so; the base's goes on behind its own header."""
        self.base(0, len(header))
        same = self.edited(len(header)) == header
        self.identical += len(header) if same else 0
        return same

    def base(self, start: int, size: int) -> bytearray:
        """Bytes of the base from `start`."""
        self._base.seek(start)
        part = _read(self._base, size)
        self.first.update(part)
        return part

    def edited(self, size: int) -> bytearray:
        """The next bytes of the checkpoint."""
        part = _read(self._edited, size)
        self.second.update(part)
        return part

    def same(self, info: TensorInfo) -> bool:
        """Whether the next bytes of the checkpoint are those of a tensor of the base."""
        same = True
        for at in range(0, info.nbytes, _CHUNK):
            size = min(_CHUNK, info.nbytes - at)
            same = (self.base(info.start + at, size) == self.edited(size)) and same
        self.identical += info.nbytes if same else 0
        return same


def _read(stream: BinaryIO, size: int) -> bytearray:
    part = bytearray(size)
    if stream.readinto(part) != size:  # type: ignore[attr-defined]
        raise CheckpointError(
            f"{stream.name} became shorter while it was read; a folder that nobody writes to was "
            "expected. Run this again when nothing writes to it."
        )
    return part


def _compare_other_experts(
    info: TensorInfo, edit: TensorEdit, sides: tuple[bytearray, bytearray], findings: Findings
) -> None:
    """Compares the experts of a tensor that were not to be edited."""
    size = len(sides[1]) // info.shape[0]
    for expert in sorted(set(range(info.shape[0])) - set(edit.experts or ())):
        before, after = (side[expert * size : (expert + 1) * size] for side in sides)
        if before == after:
            findings.identical_bytes += 0 if edit.dequantized else size
            findings.edited_bytes -= size
        else:
            findings.fault(
                f"{info.file}: expert {expert} of {info.name} differs from the base's, and {EDITS} "
                "does not name it."
            )


def _agree(leak: float | None, claimed: float | None) -> bool:
    if leak is None or claimed is None:
        return leak is claimed
    return abs(leak - claimed) <= max(_NO_LEAK, _SAME_LEAK * claimed)


def files_of(folder: Path) -> set[str]:
    """Paths of all files and links in a folder, relative to it."""
    # a link to a folder counts as one name: what it leads to was never read
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }
