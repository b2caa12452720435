"""Every byte of a checkpoint against its base."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from abliterator.checkpoint import Checkpoint, TensorInfo, carried_files
from abliterator.errors import CheckpointError
from abliterator.record import RunRecord, TensorEdit
from abliterator.verification._leak import LeakMeter

EDITS = "abliterator/edits.json"
RECORD = "abliterator/record.json"
OURS = ("README.md", "recipe.yaml", EDITS, RECORD)
"""What abliterator adds to the files of the base."""

_CHUNK = 4 << 20  # bytes compared at once
# Two measurements of one leak differ by the rounding of the sums behind them.
_SAME_LEAK = 0.05
_NO_LEAK = 1e-5


@dataclass(frozen=True)
class Verification:
    """What was found; `ok` if the checkpoint is its base with the edits of edits.json.

    Attributes:
        faults: one sentence each; empty if all holds.
        tensors: tensors of the base.
        edited: tensors that edits.json names.
        identical_bytes: bytes, headers and files beside the weights included, equal to the base's.
        edited_bytes: bytes of the edited tensors.
        max_leak: largest |Qᵀ W'| / |Qᵀ W| measured again; None without a subspace.
        base_sha256: sha256 of each weight and carried file of the base, by relative path.
        sha256: the same of the checkpoint, with the files that abliterator adds.
        foreign: files of the checkpoint folder that neither the base nor abliterator put there.
    """

    faults: tuple[str, ...]
    tensors: int
    edited: int
    identical_bytes: int
    edited_bytes: int
    max_leak: float | None
    base_sha256: Mapping[str, str]
    sha256: Mapping[str, str]
    foreign: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing was found that breaks the contract."""
        return not self.faults

    def to_json(self) -> dict[str, Any]:
        """The findings as plain values."""
        return {
            "ok": self.ok,
            "faults": list(self.faults),
            "tensors": self.tensors,
            "edited": self.edited,
            "identical_bytes": self.identical_bytes,
            "edited_bytes": self.edited_bytes,
            "max_leak": self.max_leak,
            "files": dict(self.sha256),
            "foreign": list(self.foreign),
        }


@dataclass
class _Findings:
    """What accumulates while the files are read."""

    faults: list[str] = field(default_factory=list)
    identical_bytes: int = 0
    edited_bytes: int = 0
    leaks: list[float] = field(default_factory=list)
    base_sha256: dict[str, str] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)


def verify(
    base: Path,
    checkpoint: Path,
    *,
    subspace: Path | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Verification:
    """Compares every byte of an edited checkpoint with its base.

    Args:
        base: folder of the base model.
        checkpoint: folder of the edited one.
        subspace: safetensors file with the removed subspace Q [H, k]; without it the leak is not
            measured again.
        on_bytes: called with the size of each weight file when it is done.

    Raises:
        CheckpointError: if the base is damaged, or the checkpoint has no readable edits.json. What
            is wrong with the checkpoint's own bytes is a fault, not an error.
    """
    opened = Checkpoint.open(base)
    found = _Findings()
    named = _named(read_edits(checkpoint), opened, found)
    measure = _Measure(named, _meter(opened, subspace))
    for file in opened.weight_files:
        _compare_weights(opened, file, checkpoint / file, measure, found)
        if on_bytes is not None:
            on_bytes(opened.file_bytes[file])
    carried = carried_files(base)[0]
    for file in carried:
        _compare_carried(base, checkpoint, file, found)
    _check_record(checkpoint, named, found)
    for file in OURS:
        if (checkpoint / file).is_file():
            found.sha256[file] = _sha256(checkpoint / file)
    return Verification(
        faults=tuple(found.faults),
        tensors=len(opened.tensors),
        edited=len(named),
        identical_bytes=found.identical_bytes,
        edited_bytes=found.edited_bytes,
        max_leak=max(found.leaks, default=None),
        base_sha256=found.base_sha256,
        sha256=found.sha256,
        foreign=tuple(sorted(_files_of(checkpoint) - {*opened.weight_files, *carried, *OURS})),
    )


def read_edits(checkpoint: Path) -> tuple[TensorEdit, ...]:
    """The edits that a checkpoint folder says were made to its base.

    Raises:
        CheckpointError: if edits.json is missing or is not what abliterator writes.
    """
    path = checkpoint / EDITS
    try:
        return tuple(
            TensorEdit.model_validate(edit) for edit in json.loads(path.read_text("utf-8"))
        )
    except (OSError, ValueError, TypeError) as error:
        seen = "has no" if isinstance(error, OSError) else "has an unreadable"
        raise CheckpointError(
            f"{checkpoint} {seen} {EDITS}, which says what was edited; a checkpoint that "
            "`abliterator build` or `abliterator bake` wrote was expected. Build it again."
        ) from error


def _named(
    edits: tuple[TensorEdit, ...], base: Checkpoint, found: _Findings
) -> dict[str, TensorEdit]:
    """The edits by name; a fault for each that does not fit the base."""
    named: dict[str, TensorEdit] = {}
    for edit in edits:
        info = base.tensors.get(edit.name)
        if info is None:
            found.faults.append(f"{EDITS} names {edit.name}, which the base does not have.")
        elif edit.name in named:
            found.faults.append(f"{EDITS} names {edit.name} twice.")
        elif (info.file, info.dtype, info.shape) != (edit.file, edit.dtype, edit.shape):
            found.faults.append(
                f"{EDITS} says that {edit.name} is {edit.dtype} {list(edit.shape)} in {edit.file}; "
                f"in the base it is {info.dtype} {list(info.shape)} in {info.file}."
            )
        else:
            named[edit.name] = edit
    return named


def _meter(base: Checkpoint, subspace: Path | None) -> LeakMeter | None:
    if subspace is None:
        return None
    from abliterator.directions import load_subspace

    return LeakMeter(base, load_subspace(subspace).basis)


def _compare_weights(
    base: Checkpoint,
    file: str,
    edited: Path,
    measure: _Measure,
    found: _Findings,
) -> None:
    """One weight file against the base's, from its header to its last byte."""
    size = base.file_bytes[file]
    if not _has_size(edited, file, size, found):
        return
    infos = [info for info in base.tensors.values() if info.file == file]
    with (base.folder / file).open("rb") as first, edited.open("rb") as second:
        pair = _Pair(first, second)
        if not pair.same(infos[0].start if infos else size):
            found.faults.append(f"{file}: the header differs from the base's.")
        for info in infos:
            if info.name in measure.named:
                measure.edited(pair, info, found)
            elif not pair.same(info.nbytes):
                found.faults.append(
                    f"{file}: {info.name} differs from the base's, and {EDITS} does not name it."
                )
    found.identical_bytes += pair.identical
    found.base_sha256[file], found.sha256[file] = pair.first.hexdigest(), pair.second.hexdigest()


def _has_size(path: Path, file: str, size: int, found: _Findings) -> bool:
    if not path.is_file():
        found.faults.append(f"{file} is missing.")
    elif path.stat().st_size != size:
        found.faults.append(f"{file} has {path.stat().st_size} bytes; the base's has {size}.")
    else:
        return True
    return False


class _Pair:
    """The same file of base and checkpoint, read side by side and hashed on the way."""

    def __init__(self, base: BinaryIO, edited: BinaryIO) -> None:
        self._streams = base, edited
        self.first, self.second = hashlib.sha256(), hashlib.sha256()
        self.identical = 0

    def read(self, size: int) -> tuple[bytearray, bytearray]:
        """The next `size` bytes of both."""
        parts = bytearray(size), bytearray(size)
        for stream, part in zip(self._streams, parts, strict=True):
            if stream.readinto(part) != size:  # type: ignore[attr-defined]
                raise CheckpointError(
                    f"{stream.name} became shorter while it was read; a folder that nobody "
                    "writes to was expected. Run this again when it is at rest."
                )
        self.first.update(parts[0])
        self.second.update(parts[1])
        return parts

    def same(self, size: int) -> bool:
        """Whether the next `size` bytes of both are the same."""
        same = True
        for at in range(0, size, _CHUNK):
            base, edited = self.read(min(_CHUNK, size - at))
            same = same and base == edited
        self.identical += size if same else 0
        return same


@dataclass(frozen=True)
class _Measure:
    """What edits.json says, and the subspace against which it is measured again."""

    named: Mapping[str, TensorEdit]
    meter: LeakMeter | None

    def edited(self, pair: _Pair, info: TensorInfo, found: _Findings) -> None:
        """One edited tensor: its hashes on both sides, and its leak."""
        edit = self.named[info.name]
        before, after = pair.read(info.nbytes)
        found.edited_bytes += info.nbytes
        for side, data, said in (
            ("base", before, edit.sha256_before),
            ("edited", after, edit.sha256_after),
        ):
            if hashlib.sha256(data).hexdigest() != said:
                found.faults.append(
                    f"{info.file}: the {side} bytes of {info.name} are not those that {EDITS} "
                    f"has the hash of."
                )
        if self.meter is None:
            return
        leak = self.meter.leak(info, before, after)
        found.leaks += [] if leak is None else [leak]
        if not _agree(leak, edit.leak):
            found.faults.append(
                f"{info.file}: {info.name} has a leak of {_told(leak)}, measured again; {EDITS} "
                f"says {_told(edit.leak)}."
            )


def _agree(leak: float | None, said: float | None) -> bool:
    if leak is None or said is None:
        return leak is said
    return abs(leak - said) <= max(_NO_LEAK, _SAME_LEAK * said)


def _told(leak: float | None) -> str:
    return "none" if leak is None else f"{leak:.2e}"


def _compare_carried(base: Path, checkpoint: Path, file: str, found: _Findings) -> None:
    """One file beside the weights, which must be the base's."""
    found.base_sha256[file] = _sha256(base / file)
    if not (checkpoint / file).is_file():
        found.faults.append(f"{file} is missing.")
        return
    found.sha256[file] = _sha256(checkpoint / file)
    if found.sha256[file] == found.base_sha256[file]:
        found.identical_bytes += (checkpoint / file).stat().st_size
    else:
        found.faults.append(f"{file} differs from the base's.")


def _check_record(checkpoint: Path, named: Mapping[str, TensorEdit], found: _Findings) -> None:
    """What record.json, and so the card, says of the edit and of the base; nothing if none is."""
    path = checkpoint / RECORD
    if not path.is_file():
        return
    try:
        record = RunRecord.model_validate_json(path.read_text("utf-8"))
    except ValueError:
        found.faults.append(f"{RECORD} is not a record that this version of abliterator can read.")
        return
    if record.edit.tensors != len(named):
        found.faults.append(
            f"{RECORD} speaks of {record.edit.tensors} edited tensors, {EDITS} of {len(named)}."
        )
    leak = max((edit.leak for edit in named.values() if edit.leak is not None), default=None)
    if record.edit.max_leak != leak:
        found.faults.append(
            f"{RECORD} says that the largest leak is {_told(record.edit.max_leak)}, {EDITS} "
            f"{_told(leak)}."
        )
    for file, digest in record.model.files_sha256.items():
        if found.base_sha256.get(file) != digest:
            found.faults.append(f"{file} of the base is not the one that {RECORD} was made with.")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _files_of(folder: Path) -> set[str]:
    # a link to a folder counts as one name: what lies behind it was never looked at
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }
