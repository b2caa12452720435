"""The safetensors header: 8 bytes of length (little-endian), the JSON, then the tensors' bytes.

Everything in a header is checked against the file before it is used, by the reference
implementation's rules and one more: a name that appears twice is an error, where it keeps the last.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterator.files import OpenFile, damaged, open_regular, read_fully, shown

DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Bits per element, by safetensors' names; of a dtype that is not here, the size goes unchecked."""

# The reference implementation's limit: a wrong length allocates little.
MAX_JSON_BYTES = 100_000_000
_MAX_DEPTH = 64  # levels of lists and objects; configs have a handful
_MAX_SIZE = 2**64 - 1  # sizes and offsets are unsigned 64-bit numbers in the format
_PREFIX = 8


@dataclass(frozen=True)
class TensorInfo:
    """Position of one tensor: bytes `start` to `end` (absolute, end excluded) of `file`.

    `file` is relative to the checkpoint's folder; `dtype` is safetensors' name ("BF16").
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Number of bytes the tensor takes in its file."""
        return self.end - self.start


def read_header(folder: Path, file: str) -> tuple[list[TensorInfo], int]:
    """Read and check the header of one safetensors file.

    Returns:
        The tensors in the order of their bytes, and the size of the file in bytes.

    Raises:
        CheckpointError: the file is missing, truncated, or its header does not fit the file.
    """
    path = folder / file
    with open_regular(path) as source:
        text = _header_text(source)
    header = parse_json_object(text, path, what="its header")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise damaged(path, "__metadata__ in its header is not an object of strings")
    data_start = _PREFIX + len(text)
    tensors = [_tensor(path, file, name, entry, data_start) for name, entry in header.items()]
    tensors.sort(key=lambda info: (info.start, info.end))
    _check_layout(path, tensors, data_start, source.size)
    return tensors, source.size


def header_of(tensors: list[tuple[str, str, tuple[int, ...], int]], *, like: bytes) -> bytes:
    """The header of a file that holds these tensors (name, dtype, shape, bytes) in this order.

    Its metadata is that of the header `like`, which has been checked. As in the reference
    implementation, spaces at the end make the tensors begin at a multiple of 8.
    """
    metadata = json.loads(like[_PREFIX:]).get("__metadata__")
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    for name, dtype, shape, size in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_PREFIX, "little") + text


def parse_json_object(text: bytes, path: Path, *, what: str) -> dict[str, Any]:
    """Parse UTF-8 bytes as one JSON object without duplicate names; errors say `what` it is.

    NaN and Infinity pass, as in transformers: configs of Mamba-like models have them.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"{what} is not readable JSON ({shown(error)})") from error
    if not isinstance(value, dict):
        raise damaged(path, f"{what} is a JSON {type(value).__name__}, not an object")
    _check_depth(value, path, what)
    return value


def _check_depth(value: dict[str, Any], path: Path, what: str) -> None:
    """Refuses nesting so deep that JSON writers or loaders would overflow the stack."""
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        below = (v.values() if isinstance(v, dict) else v for v in level)
        level = [inner for values in below for inner in values if isinstance(inner, (dict, list))]
        if not level:
            return
    raise damaged(path, f"{what} is nested more than {_MAX_DEPTH} levels deep")


def encodable(text: str) -> bool:
    """Whether `text` has no lone surrogates, which JSON can spell and no file name can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _header_text(source: OpenFile) -> bytes:
    path, size = source.path, source.size
    if size < _PREFIX:
        raise damaged(path, f"it has {size} bytes, too few for the length of a header")
    length = int.from_bytes(read_exactly(source, _PREFIX), "little")
    if length > MAX_JSON_BYTES:
        raise damaged(path, f"its header claims {length} bytes; {MAX_JSON_BYTES} are allowed")
    if length > size - _PREFIX:
        raise damaged(path, f"its header claims {length} bytes, more than the file has ({size})")
    text = read_exactly(source, length)
    if not text.startswith(b"{"):
        raise damaged(path, "its header does not begin with '{', so it is not safetensors")
    return text


def read_exactly(source: OpenFile, length: int) -> bytes:
    """Reads the next `length` bytes of a file."""
    buffer = bytearray(length)
    read_fully(source, memoryview(buffer))
    return bytes(buffer)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the name {shown(name)} appears twice")
        result[name] = value
    return result


def _tensor(path: Path, file: str, name: str, entry: object, data_start: int) -> TensorInfo:
    """Parses one entry, and checks dtype, shape and size; `_check_layout` checks all offsets."""
    label = f"the tensor {shown(name)}"
    if not encodable(name):
        raise damaged(path, f"{label} has a name that is not Unicode text")
    if not isinstance(entry, dict):
        raise damaged(path, f"{label} is not described by an object")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str):
        raise damaged(path, f"{label} has no dtype")
    shape = _sizes(entry.get("shape"))
    if shape is None:
        raise damaged(path, f"{label} has a shape that is not a list of sizes")
    offsets = _sizes(entry.get("data_offsets"))
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise damaged(path, f"{label} has data_offsets that are not [begin, end]")
    start, end = offsets
    _check_size(path, label, dtype, shape, end - start)
    return TensorInfo(name, file, dtype, shape, data_start + start, data_start + end)


def _sizes(value: object) -> tuple[int, ...] | None:
    # `type is int`, because a bool is an int to Python: `true` must not pass for 1.
    if isinstance(value, list) and all(type(x) is int and 0 <= x <= _MAX_SIZE for x in value):
        return tuple(value)
    return None


def _check_size(path: Path, label: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> None:
    elements = 1
    for size in shape:
        elements *= size
        if elements > _MAX_SIZE:  # stop here: the whole product could take minutes to multiply
            raise damaged(path, f"{label} has a shape larger than any file")
    bits = DTYPE_BITS.get(dtype)
    if bits is not None and elements * bits != nbytes * 8:
        raise damaged(
            path,
            f"{label} takes {nbytes} bytes, but {elements} elements of {dtype} take "
            f"{elements * bits / 8:g}",
        )


def _check_layout(path: Path, tensors: list[TensorInfo], data_start: int, size: int) -> None:
    """Checks that tensors fill the file from the header to its end, without hole or overlap."""
    at = data_start
    for info in tensors:
        if info.start != at:
            fault = "overlaps the tensor" if info.start < at else "leaves a hole"
            raise damaged(path, f"the tensor {shown(info.name)} {fault} before it")
        at = info.end
    if at > size:
        raise damaged(path, f"it has {size} bytes, but its tensors need {at}: it is truncated")
    if at < size:
        raise damaged(path, f"it has {size} bytes, {size - at} more than its tensors take")
