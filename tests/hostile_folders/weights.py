"""Damage to weights: headers, and the index of shards."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from tests.hostile_folders.texts import WEIGHTS, clear, field_of, read, without_a_file, write
from tests.hostile_folders.values import brief, hostile

TENSOR_FAULTS = (
    *("inf", "nan", "one-inf", "zeros", "flat", "swapped", "dtype", "renamed", "long-header"),
    *("cut", "metadata", "moved", "gone"),
)


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the bytes after it."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header: dict[str, Any], body: bytes) -> bytes:
    """A safetensors file."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def weights(rng: random.Random, folder: Path) -> str:
    """A tensor of a weight file gets other numbers, another shape, dtype or name."""
    files = sorted(
        p for p in folder.glob("*.safetensors") if p.is_file() and p.stat().st_size < 1 << 24
    )
    if not files:
        return without_a_file(rng, folder)
    path = rng.choice(files)
    header, body = header_of(path.read_bytes())
    name = rng.choice(sorted(header.keys() - {"__metadata__"}))
    entry, data = header[name], bytearray(body)
    start, stop = entry["data_offsets"]
    kind = rng.choice(TENSOR_FAULTS)
    half = {"inf": b"\x80\x7f", "nan": b"\xc0\x7f", "zeros": b"\0\0"}
    if kind in half:
        data[start:stop] = half[kind] * ((stop - start) // 2)
    elif kind == "one-inf":
        data[start : start + 2] = b"\x80\x7f"
    elif kind == "flat":
        entry["shape"] = [math.prod(entry["shape"])]
    elif kind == "swapped":
        entry["shape"] = entry["shape"][::-1]
    elif kind == "dtype":
        entry["dtype"] = rng.choice(["F16", "I16", "U16", "F32", "X9", "F8_E4M3"])
    elif kind == "renamed":
        new = rng.choice(["lm_head.weight", "x", "", "\x1b[2J", "model.layers.99.a", "a" * 3000])
        header[new] = header.pop(name)
    elif kind == "metadata":
        header["__metadata__"] = rng.choice([{"format": "tf"}, {}, {"format": "\x1b"}, {"a": 1}, 3])
    elif kind == "moved":
        entry["data_offsets"] = [start + rng.choice([-1, 2, 2**40]), stop]
    elif kind == "gone":
        del header[name]
    if kind == "long-header":
        path.write_bytes(rng.choice([0, 2**20, 10**8, 2**63]).to_bytes(8, "little") + bytes(data))
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[: rng.randrange(len(data))])
    else:
        path.write_bytes(with_header(header, bytes(data)))
    return f"{path.name}: {kind} {brief(name)}"


def index(rng: random.Random, folder: Path) -> str:
    """An index of shards that says something else; of a single file it is made first."""
    path = folder / "model.safetensors.index.json"
    if not path.is_file():
        single = folder / WEIGHTS
        if not single.is_file() or single.stat().st_size > 1 << 24:
            return without_a_file(rng, folder)
        header, _ = header_of(single.read_bytes())
        clear(folder / "model-00001-of-00001.safetensors")
        single.rename(folder / "model-00001-of-00001.safetensors")
        names = header.keys() - {"__metadata__"}
        write(
            path,
            {
                "metadata": {},
                "weight_map": dict.fromkeys(sorted(names), "model-00001-of-00001.safetensors"),
            },
        )
    values = read(path)
    if not isinstance(values, dict) or not isinstance(values.get("weight_map"), dict):
        return field_of(path.name, ("weight_map", "metadata"))(rng, folder)
    files = sorted(map(str, values["weight_map"].values())) or ["x.safetensors"]
    kind = rng.choice(["tied head", "extra", "gone", "elsewhere", "type", "metadata"])
    if kind == "tied head":
        values["weight_map"]["lm_head.weight"] = rng.choice(files)
    elif kind == "extra":
        values["weight_map"]["model.layers.1.x.weight"] = rng.choice(files)
    elif kind == "gone":
        values["weight_map"].pop(rng.choice(sorted(values["weight_map"])), None)
    elif kind == "elsewhere":
        new = rng.choice(["../private.txt", "/etc/passwd", "", "x.bin", "sub/x.safetensors", 3])
        values["weight_map"][rng.choice(sorted(values["weight_map"]))] = new
    elif kind == "type":
        values["weight_map"] = hostile(rng)
    else:
        values["metadata"] = hostile(rng)
    write(path, values)
    return f"index: {kind}"
