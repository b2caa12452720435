"""A checkpoint in one file, in shards, and as the Hub's cache keeps it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from tests.checkpoint.stored import SHAPES, pack, write_index


@pytest.fixture
def single(tmp_path: Path) -> Path:
    folder = tmp_path / "single"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(pack(SHAPES))
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    names = list(SHAPES)
    weight_map = {}
    for file, part in {"b.safetensors": names[:3], "sub/a.safetensors": names[3:]}.items():
        (folder / file).write_bytes(pack({name: SHAPES[name] for name in part}))
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    return folder


@pytest.fixture
def hub_cache(sharded: Path, tmp_path: Path) -> Path:
    """The sharded folder as huggingface_hub lays it out: every file a link to ../../blobs/HASH."""
    repo = tmp_path / "models--some--model"
    blobs, snapshot = repo / "blobs", repo / "snapshots" / ("0" * 40)
    blobs.mkdir(parents=True)
    for path in sorted(sharded.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            lfs = path.suffix == ".safetensors"
            blob = blobs / (hashlib.sha256 if lfs else hashlib.sha1)(data).hexdigest()
            blob.write_bytes(data)
            link = snapshot / path.relative_to(sharded)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.fixture(params=["single", "sharded", "hub_cache"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)
