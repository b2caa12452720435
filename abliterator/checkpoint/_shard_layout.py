"""Headers and index of a checkpoint some of whose tensors change name, dtype or shape."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from abliterator.checkpoint._folder import INDEX_FILE, Checkpoint, read_json
from abliterator.checkpoint._header import DTYPE_BITS, TensorInfo, header_of
from abliterator.files import open_regular
from abliterator.formats import Header


class TensorHeader(Header, Protocol):
    """A tensor's entry in a header, with its name."""

    @property
    def name(self) -> str:
        """Name of the tensor."""


@dataclass(frozen=True)
class ShardLayout:
    """Header and tensor positions of one weight file after an edit.

    Attributes:
        header: first bytes of the file, up to the first tensor.
        tensors: pairs (tensor of the base, tensor in this file), in the order of their bytes.
        size: of the file, in bytes.
    """

    header: bytes
    tensors: tuple[tuple[TensorInfo, TensorInfo], ...]
    size: int

    @property
    def changed(self) -> bool:
        """Whether a tensor differs from the base's in name, dtype, shape or position."""
        return any(old != new for old, new in self.tensors)


def shard_layout(
    base: Checkpoint, file: str, changes: Mapping[str, TensorHeader], dropped: Collection[str]
) -> ShardLayout:
    """The layout of one weight file after tensors were changed and left out.

    A file with neither keeps the base's header. In any other, wider numbers come first, as the
    reference implementation writes them, so that every tensor stays aligned; else the order is the
    base's.

    Args:
        base: the checkpoint.
        file: one of its weight files.
        changes: new name, dtype and shape of tensors, by the base's name.
        dropped: names of tensors that are left out.

    Raises:
        CheckpointError: the file cannot be read.
    """
    infos = [info for info in base.tensors.values() if info.file == file]
    with open_regular(base.folder / file) as source:
        end = infos[0].start if infos else source.size
        header = source.stream.read(end)
    remaining = [info for info in infos if info.name not in dropped]
    if len(remaining) == len(infos) and not any(info.name in changes for info in infos):
        return ShardLayout(header, tuple((info, info) for info in infos), base.file_bytes[file])
    pairs: list[tuple[TensorInfo, TensorHeader]] = [
        (info, changes.get(info.name, info)) for info in remaining
    ]
    pairs.sort(key=lambda pair: -DTYPE_BITS.get(pair[1].dtype, 8))
    entries = [(new.name, new.dtype, new.shape, _nbytes(info, new)) for info, new in pairs]
    header = header_of(entries, like=header)
    at, tensors = len(header), []
    for (info, _), (name, dtype, shape, size) in zip(pairs, entries, strict=True):
        tensors.append((info, TensorInfo(name, file, dtype, shape, at, at + size)))
        at += size
    return ShardLayout(header, tuple(tensors), at)


def edited_index(
    base: Checkpoint, changes: Mapping[str, TensorHeader], dropped: Collection[str]
) -> str | None:
    """The text of the edited checkpoint's index; None if the base has none or nothing changes."""
    path = base.folder / INDEX_FILE
    if not (changes or dropped) or not path.is_file():
        return None
    index = read_json(path)
    index["weight_map"] = {
        changes[name].name if name in changes else name: file
        for name, file in index["weight_map"].items()
        if name not in dropped
    }
    if isinstance(index.get("metadata"), dict):
        total = sum(
            _nbytes(info, changes[name]) if name in changes else info.nbytes
            for name, info in base.tensors.items()
            if name not in dropped
        )
        index["metadata"] = {**index["metadata"], "total_size": total}
    return json.dumps(index, indent=2) + "\n"


def _nbytes(info: TensorInfo, new: TensorHeader) -> int:
    if (info.dtype, info.shape) == (new.dtype, new.shape):
        return info.nbytes
    return math.prod(new.shape) * DTYPE_BITS[new.dtype] // 8
