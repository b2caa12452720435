"""The checkpoint room, judged by the reference safetensors reader and by plain struct and json."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from abliterator.checkpoint import Checkpoint, auxiliary_files
from abliterator.errors import FileError
from abliterator.files import (
    copy_file,
    free_bytes,
    write_bytes_atomic,
    write_text_atomic,
)
from tests.checkpoint.stored import SHAPES, pack, tensors_of

# Opening


def test_open_agrees_with_the_reference_reader(folder: Path):
    base = Checkpoint.open(folder)
    assert base.config == {"model_type": "llama"}
    assert set(base.tensors) == set(SHAPES)
    for file in base.weight_files:
        for name, (dtype, shape, data) in tensors_of(folder / file).items():
            info = base.tensors[name]
            assert (info.file, info.dtype, info.shape) == (file, dtype, shape)
            assert base.read(name) == data
            assert (folder / file).read_bytes()[info.start : info.end] == data
    assert base.shapes == {name: tuple(shape) for name, (_, shape) in SHAPES.items()}
    assert base.total_bytes == sum((folder / file).stat().st_size for file in base.weight_files)


def test_tensors_come_in_the_order_of_files_and_of_bytes(sharded: Path):
    base = Checkpoint.open(sharded)
    assert base.weight_files == ("b.safetensors", "sub/a.safetensors")
    places = [(info.file, info.start) for info in base.tensors.values()]
    assert places == sorted(places)


def test_a_single_file_goes_before_an_index_as_in_transformers(sharded: Path):
    (sharded / "model.safetensors").write_bytes(pack({"only": ("F32", [2])}))
    assert list(Checkpoint.open(sharded).tensors) == ["only"]
    _, left_out = auxiliary_files(sharded)
    assert left_out == ["b.safetensors", "model.safetensors.index.json", "sub/"]


def test_an_unknown_dtype_is_kept_for_others_to_judge(single: Path):
    text = b'{"x": {"dtype": "Q3_K", "shape": [5], "data_offsets": [0, 2]}}'
    data = len(text).to_bytes(8, "little") + text + b"ab"
    (single / "model.safetensors").write_bytes(data)
    info = Checkpoint.open(single).tensors["x"]
    assert (info.dtype, info.shape, info.nbytes) == ("Q3_K", (5,), 2)


def test_a_config_may_hold_infinity_as_in_mamba(single: Path):
    (single / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    assert Checkpoint.open(single).config["time_step_limit"][1] == float("inf")


def test_read_gives_the_bytes_of_one_tensor(single: Path):
    base = Checkpoint.open(single)
    expected = tensors_of(single / "model.safetensors")
    assert {name: base.read(name) for name in base.tensors} == {
        name: data for name, (_, _, data) in expected.items()
    }


def test_the_room_needs_no_torch():
    code = "import sys, abliterator.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Whole files


def test_copy_file_copies_links_as_files_and_never_links(hub_cache: Path, tmp_path: Path):
    copied = tmp_path / "new" / "config.json"
    assert (
        copy_file(hub_cache / "config.json", copied) == (hub_cache / "config.json").stat().st_size
    )
    assert not copied.is_symlink()
    assert copied.stat().st_nlink == 1
    assert copied.read_bytes() == (hub_cache / "config.json").read_bytes()
    (tmp_path / "empty").touch()
    assert copy_file(tmp_path / "empty", tmp_path / "new" / "empty") == 0


def test_copy_file_names_what_it_cannot_read_or_write(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileError, match=r"absent is missing"):
        copy_file(tmp_path / "absent", tmp_path / "out")
    with pytest.raises(FileError, match=r"cannot be (read|written)"):
        copy_file(tmp_path / "file", tmp_path / "file" / "out")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="not a regular file"):
        copy_file(tmp_path / "pipe", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe"]


def test_atomic_writes_replace_whole_files(tmp_path: Path, monkeypatch):
    path = tmp_path / "made" / "for" / "it.json"
    write_text_atomic(path, "zwölf\n")
    assert path.read_bytes() == "zwölf\n".encode()
    write_bytes_atomic(path, b"")
    assert path.read_bytes() == b""
    write_bytes_atomic(path, b"good")

    def fail(_descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(FileError, match="Input/output error"):
        write_bytes_atomic(path, b"bad")
    assert path.read_bytes() == b"good"
    assert list(path.parent.iterdir()) == [path]


def test_free_bytes_asks_the_nearest_folder_that_exists(tmp_path: Path):
    free = free_bytes(tmp_path)
    assert free > 0
    assert abs(free_bytes(tmp_path / "not" / "made" / "yet") - free) < 1 << 30
