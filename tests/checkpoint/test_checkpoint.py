"""The checkpoint room, judged by the reference safetensors reader and by plain struct and json."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import deserialize

from abliterator.checkpoint import Checkpoint, TensorInfo, auxiliary_files, fingerprint, patch_file
from abliterator.errors import CheckpointError, FileError
from abliterator.files import (
    FileHashes,
    OpenFile,
    copy_file,
    free_bytes,
    read_fully,
    write_bytes_atomic,
    write_fully,
    write_text_atomic,
)
from tests.files.seams import copy_in_chunks

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


# Patching


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


# Which files go along

CARRIED = """
LICENSE Notice.txt USE_POLICY.md MODEL_LICENSE "Some LICENSE AGREEMENT" COPYING
added_tokens.json chat_template.jinja chat_template.json generation_config.json merges.txt
modeling_some.py kernel.cu preprocessor_config.json processor_config.json some.tiktoken
special_tokens_map.json spiece.model tekken.json tokenizer.json tokenizer.model tokenizer.model.v3
tokenizer_config.json video_preprocessor_config.json vocab.json vocab.txt source.spm
additional_chat_templates/tool_use.jinja code/deep/layers.py
"""
LEFT_OUT = """
.gitattributes README.md pytorch_model.bin model.gguf consolidated.00.pth consolidated.safetensors
license.png model-fp16.safetensors notes.txt params.json training_args.bin tokenizer.bin
code/data.csv
"""
LEFT_FOLDERS = """
.cache/huggingface/x .eval_results/a.yaml .git/config original/params.json original/tokenizer.model
onnx/model.onnx original/tool.py __pycache__/modeling_some.cpython-311.pyc code/__pycache__/x.py
"""


def names(text: str) -> list[str]:
    return shlex.split(text)


def test_every_file_is_carried_or_named(folder: Path):
    index = [] if folder.name == "single" else ["model.safetensors.index.json"]
    for name in names(CARRIED) + names(LEFT_OUT) + names(LEFT_FOLDERS):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    carried, left_out = auxiliary_files(folder)
    assert carried == sorted([*names(CARRIED), "config.json", *index])
    folders = [".cache/", ".eval_results/", ".git/", "__pycache__/", "code/__pycache__/"]
    assert left_out == sorted([*names(LEFT_OUT), *folders, "onnx/", "original/"])


def test_every_file_a_tokenizer_of_transformers_asks_for_is_carried(single: Path):
    transformers = Path(pytest.importorskip("transformers").__file__).parent
    asked = set()
    for source in transformers.rglob("tokenization*.py"):
        block = re.search(r"^VOCAB_FILES_NAMES = \{(.*?)\}", source.read_text(), re.M | re.S)
        if block:
            asked |= set(re.findall(r':\s*"([^"]+\.\w+)"', block[1]))
    assert len(asked) > 10
    for name in asked:
        (single / name).write_text("x")
    assert asked - set(auxiliary_files(single)[0]) == set()


def test_a_carried_file_that_is_a_broken_link_stops(single: Path):
    (single / "tokenizer.json").symlink_to("gone")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a link to a file that is not"):
        auxiliary_files(single)


def test_a_broken_link_nobody_needs_is_only_named(single: Path):
    (single / "notes.txt").symlink_to("gone")
    assert auxiliary_files(single) == (["config.json"], ["notes.txt"])


def test_links_to_folders_are_named_and_not_entered(single: Path, tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret.py").write_text("x")
    (single / "code").symlink_to(tmp_path / "elsewhere")
    assert auxiliary_files(single) == (["config.json"], ["code/"])


# Fingerprints


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def count_hashing(monkeypatch) -> list:
    real, hashed = hashlib.file_digest, []

    def counting(stream, name):
        hashed.append(Path(stream.name).name)
        return real(stream, name)

    monkeypatch.setattr(hashlib, "file_digest", counting)
    return hashed


def test_fingerprint_is_the_hash_of_every_file(folder: Path):
    (folder / "README.md").write_text("not carried")
    base = Checkpoint.open(folder)
    files = [*base.weight_files, *auxiliary_files(folder)[0]]
    assert fingerprint(base) == {file: sha256_of(folder / file) for file in files}


def test_fingerprint_takes_the_name_of_a_hub_blob(hub_cache: Path, monkeypatch):
    hashed = count_hashing(monkeypatch)
    base = Checkpoint.open(hub_cache)
    result = fingerprint(base)
    assert {file: result[file] for file in base.weight_files} == {
        file: sha256_of(hub_cache / file) for file in base.weight_files
    }
    assert len(hashed) == 2  # config.json and the index, which are named by git's hash


def test_fingerprint_remembers_files_that_stay_and_hashes_those_that_change(
    single: Path, tmp_path: Path, monkeypatch
):
    base, cache = Checkpoint.open(single), tmp_path / "work" / "hashes.json"
    monkeypatch.setattr(FileHashes, "SETTLED_NS", -1)
    hashed = count_hashing(monkeypatch)
    first = fingerprint(base, cache=cache)
    assert fingerprint(base, cache=cache) == first
    assert sorted(hashed) == ["config.json", "model.safetensors"]
    weights = single / "model.safetensors"
    status = weights.stat()
    weights.write_bytes(bytes([*weights.read_bytes()[:-1], 1]))
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a restored archive has it
    changed = fingerprint(base, cache=cache)
    assert changed["model.safetensors"] == sha256_of(weights)
    assert changed["config.json"] == first["config.json"]
    assert len(hashed) == 3


def test_fingerprint_does_not_remember_a_file_that_was_just_written(single, tmp_path, monkeypatch):
    cache, hashed = tmp_path / "hashes.json", count_hashing(monkeypatch)
    for _ in range(2):
        fingerprint(Checkpoint.open(single), cache=cache)
    assert len(hashed) == 4
    assert not cache.exists()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"x": 1}', "\xff", "WRONG"])
def test_fingerprint_survives_any_cache(single: Path, tmp_path: Path, text: str):
    cache = tmp_path / "hashes.json"
    entry = {str(single / "config.json"): {"size": [], "sha256": 7}}
    cache.write_text(json.dumps(entry) if text == "WRONG" else text, encoding="latin-1")
    result = fingerprint(Checkpoint.open(single), cache=cache)
    assert result["config.json"] == sha256_of(single / "config.json")
