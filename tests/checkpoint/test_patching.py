"""Patching: only the edited tensors differ, and what interrupts it leaves nothing behind."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from abliterator.checkpoint import Checkpoint, TensorInfo, patch_file
from abliterator.errors import FileError
from abliterator.files import (
    OpenFile,
    copy_file,
    read_fully,
    write_fully,
)
from tests.checkpoint.stored import EDITED, header_of, invert, pack, patch_all, tensors_of
from tests.files.seams import copy_in_chunks


def test_only_the_edited_tensors_differ(folder: Path, tmp_path: Path):
    base = Checkpoint.open(folder)
    out = tmp_path / "out"
    patched = patch_all(base, out, EDITED)
    assert set(patched) == set(EDITED)
    for file in base.weight_files:
        assert header_of(out / file) == header_of(folder / file)
        assert not (out / file).is_symlink()
        before, after = tensors_of(folder / file), tensors_of(out / file)
        assert set(before) == set(after)
        for name, (dtype, shape, data) in before.items():
            expected = bytes(byte ^ 0xFF for byte in data) if name in EDITED else data
            assert after[name] == (dtype, shape, expected)
            if name in EDITED:
                assert patched[name].sha256_before == hashlib.sha256(data).hexdigest()
                assert patched[name].sha256_after == hashlib.sha256(expected).hexdigest()
    assert sorted(path for path in out.rglob("*") if path.is_file()) == sorted(
        out / file for file in base.weight_files
    )


@pytest.mark.parametrize("kernel_copies", [True, False])
def test_tensors_larger_than_a_chunk_are_copied_and_hashed_whole(
    tmp_path, monkeypatch, kernel_copies
):
    """Hashes go by 256 KiB and copies by 8 MiB: both tensors end within a later chunk."""
    shapes = {"copied": ("BF16", [(9 << 20) // 2 + 3]), "edited": ("F16", [(1 << 20) + 5])}
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(pack(shapes))
    if not kernel_copies:
        monkeypatch.delattr(os, "copy_file_range")
    inverted = bytes(reversed(range(256)))

    def edit(_info: TensorInfo, buffer: memoryview) -> None:
        buffer[:] = bytes(buffer).translate(inverted)

    base, out = Checkpoint.open(folder), tmp_path / "out"
    patched = patch_all(base, out, ["edited"], edit)["edited"]
    copy_file(folder / "config.json", out / "config.json")
    before, after = base.read("edited"), Checkpoint.open(out).read("edited")
    assert after == before.translate(inverted)
    assert patched.sha256_before == hashlib.sha256(before).hexdigest()
    assert patched.sha256_after == hashlib.sha256(after).hexdigest()
    assert base.read("copied") == Checkpoint.open(out).read("copied")


def test_the_base_is_left_as_it_was(folder: Path, tmp_path: Path):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    patch_all(Checkpoint.open(folder), tmp_path / "out", EDITED)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_no_edit_is_a_copy_and_all_edits_reach_both_ends(single: Path, tmp_path: Path):
    base = Checkpoint.open(single)
    source, out = single / "model.safetensors", tmp_path / "out.safetensors"
    assert patch_file(source, out, [], invert).tensors == ()
    assert out.read_bytes() == source.read_bytes()
    patch_file(source, out, base.tensors.values(), invert)  # the older file is replaced
    header = header_of(source)
    data = source.read_bytes()[len(header) :]
    assert out.read_bytes() == header + bytes(byte ^ 0xFF for byte in data)


def test_one_buffer_serves_all_edits_in_file_order(single: Path, tmp_path: Path):
    base = Checkpoint.open(single)
    seen, owners = [], set()

    def edit(info: TensorInfo, buffer: memoryview) -> None:
        seen.append(info.name)
        owners.add(id(buffer.obj))

    infos = [base.tensors[name] for name in EDITED]
    patch_file(single / "model.safetensors", tmp_path / "out", infos, edit)
    assert seen == ["layers.0.o_proj", "layers.0.mlp", "layers.1.o_proj"]
    assert len(owners) == 1


@pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOSYS, errno.EINVAL, None])
def test_without_the_kernels_copy_the_bytes_are_the_same(single, tmp_path, monkeypatch, code):
    def refuse(*_args):
        raise OSError(code, os.strerror(code))

    if code is None:
        monkeypatch.delattr(os, "copy_file_range")
    else:
        monkeypatch.setattr(os, "copy_file_range", refuse)
    copy_in_chunks(monkeypatch, 5)
    test_only_the_edited_tensors_differ(single, tmp_path)


def test_short_kernel_copies_are_taken_up_again(single, tmp_path, monkeypatch):
    real, calls = os.copy_file_range, []

    def stingy(source, target, count, at, to):
        calls.append(at)
        if len(calls) == 4:
            raise OSError(errno.EXDEV, "half way, as some network file systems do")
        return real(source, target, min(count, 3), at, to)

    monkeypatch.setattr(os, "copy_file_range", stingy)
    test_only_the_edited_tensors_differ(single, tmp_path)
    assert len(calls) > 4


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), OSError(5, "its own")])
def test_an_interrupted_edit_leaves_nothing_and_keeps_its_error(single, tmp_path, error):
    base, out = Checkpoint.open(single), tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("the older file")

    def edit(info: TensorInfo, _buffer: memoryview) -> None:
        if info.name == "layers.0.mlp":
            assert (out / ".model.safetensors.partial").exists()
            raise error

    with pytest.raises(type(error)) as caught:
        patch_all(base, out, EDITED, edit)
    assert caught.value is error
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]
    assert (out / "model.safetensors").read_text() == "the older file"


def test_a_partial_file_of_a_killed_run_is_no_obstacle(single: Path, tmp_path: Path):
    bystander = tmp_path / "bystander"
    bystander.write_text("untouched")
    (tmp_path / ".out.partial").symlink_to(bystander)
    copy_file(single / "model.safetensors", tmp_path / "out")
    assert bystander.read_text() == "untouched"
    assert (tmp_path / "out").read_bytes() == (single / "model.safetensors").read_bytes()
    assert not (tmp_path / ".out.partial").is_symlink()


@pytest.mark.parametrize("call", ["copy_file_range", "fsync"])
def test_a_full_disk_says_how_much_is_needed(single, tmp_path, monkeypatch, call):
    base = Checkpoint.open(single)

    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(FileError, match=f"it needs {base.total_bytes:,} bytes"):
        patch_all(base, tmp_path / "out", EDITED)
    assert list((tmp_path / "out").iterdir()) == []


def test_too_small_a_disk_is_met_before_the_work(single, tmp_path, monkeypatch):
    base = Checkpoint.open(single)
    usage = SimpleNamespace(free=base.total_bytes - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    touched = []
    with pytest.raises(FileError, match=f"bytes, {base.total_bytes - 1:,} are free"):
        patch_all(base, tmp_path / "out", EDITED, lambda info, _: touched.append(info.name))
    assert touched == []
    assert not (tmp_path / "out").exists()


class Stingy(io.FileIO):
    """A stream that takes and gives three bytes at a time, as any unbuffered stream may."""

    def readinto(self, buffer):
        return super().readinto(memoryview(buffer)[:3])

    def write(self, data):
        return super().write(memoryview(data)[:3])


def test_short_reads_and_writes_are_taken_up_again(tmp_path: Path):
    path, data = tmp_path / "file", bytes(range(20))
    with Stingy(path, "w") as stream:
        write_fully(OpenFile(path, stream, 20), memoryview(data))
    assert path.read_bytes() == data
    buffer = bytearray(20)
    with Stingy(path, "r") as stream:
        read_fully(OpenFile(path, stream, 20), memoryview(buffer))
    assert buffer == data


def test_a_file_is_never_written_over_itself(single: Path, tmp_path: Path):
    source = single / "model.safetensors"
    link = tmp_path / "link.safetensors"
    link.symlink_to(source)
    before = source.read_bytes()
    for destination in (source, link):
        with pytest.raises(FileError, match="another output folder"):
            patch_file(source, destination, [], invert)
        with pytest.raises(FileError, match="another output folder"):
            copy_file(source, destination)
    assert source.read_bytes() == before


def test_a_source_cut_short_after_it_was_opened_is_named(single: Path, tmp_path: Path):
    base = Checkpoint.open(single)
    source = single / "model.safetensors"
    os.truncate(source, base.total_bytes - 40)
    with pytest.raises(FileError, match="shorter since"):
        patch_file(source, tmp_path / "out", base.tensors.values(), invert)
    with pytest.raises(FileError, match="damaged"):
        base.read("layers.1.blocks")
    assert not (tmp_path / "out").exists()


def test_a_tensor_given_twice_is_a_mistake_of_the_caller(single: Path, tmp_path: Path):
    info = Checkpoint.open(single).tensors["layers.0.mlp"]
    with pytest.raises(ValueError, match="twice"):
        patch_file(single / "model.safetensors", tmp_path / "out", [info, info], invert)
