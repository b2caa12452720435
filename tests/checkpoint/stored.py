"""Small checkpoints with known bytes, and what their files hold."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safetensors import deserialize

from abliterator.checkpoint import Checkpoint, TensorInfo, patch_file

SHAPES = {
    "embed": ("BF16", [7, 4]),
    "layers.0.o_proj": ("BF16", [4, 4]),
    "layers.0.bias": ("F32", [3]),
    "layers.0.mlp": ("F16", [4, 6]),
    "layers.1.o_proj": ("BF16", [4, 4]),
    "layers.1.blocks": ("F4", [2, 8]),
    "nothing": ("F32", [0, 4]),
    "mask": ("BOOL", [5]),
}
EDITED = ["layers.1.o_proj", "layers.0.mlp", "layers.0.o_proj"]


def pack(shapes: dict, *, metadata: dict | None = None, pad: int = 3) -> bytes:
    """A safetensors file with content that differs everywhere and a header nobody would write."""
    bits = {"BF16": 16, "F16": 16, "F32": 32, "F4": 4, "BOOL": 8}
    header: dict = {"__metadata__": metadata or {"format": "pt", "note": "not ours"}}
    data = b""
    for name, (dtype, shape) in shapes.items():
        count = 1
        for size in shape:
            count *= size
        chunk = hashlib.shake_128(name.encode()).digest(count * bits[dtype] // 8)
        if dtype == "BOOL":
            chunk = bytes(byte & 1 for byte in chunk)
        offsets = [len(data), len(data) + len(chunk)]
        header[name] = {"data_offsets": offsets, "shape": shape, "dtype": dtype}
        data += chunk
    text = json.dumps(header, indent=1).encode() + b" " * pad
    return len(text).to_bytes(8, "little") + text + data


def tensors_of(path: Path) -> dict[str, tuple]:
    """What the reference implementation reads: dtype, shape and bytes by name."""
    return {
        name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
        for name, entry in deserialize(path.read_bytes())
    }


def header_of(path: Path) -> bytes:
    data = path.read_bytes()
    return data[: 8 + int.from_bytes(data[:8], "little")]


def write_index(folder: Path, weight_map: object) -> None:
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def invert(info: TensorInfo, buffer: memoryview) -> None:
    assert len(buffer) == info.nbytes
    for i, byte in enumerate(buffer):
        buffer[i] = byte ^ 0xFF


def patch_all(base: Checkpoint, out: Path, names: list[str], edit=invert) -> dict:
    patched = {}
    for file in base.weight_files:
        infos = [base.tensors[name] for name in names if base.tensors[name].file == file]
        result = patch_file(base.folder / file, out / file, infos, edit)
        patched |= {tensor.name: tensor for tensor in result.tensors}
    return patched
