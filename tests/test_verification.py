"""The byte contract: sound checkpoints pass, and every kind of damage is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from abliterator import pipeline
from abliterator.checkpoint import Checkpoint
from abliterator.errors import CheckpointError
from abliterator.verification import EDITS, verify

FAMILIES = ("llama", "llama_biased", "llama_tied", "gemma", "phi3", "smollm3")
WRITER = "model.layers.1.mlp.down_proj.weight"
READER = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def baked(tmp_path, tiny_folder):
    """`baked(family, **options)`: (base, checkpoint, subspace file)."""

    def make(family: str = "llama", **options: object) -> tuple[Path, Path, Path]:
        base = tiny_folder(family, **options)
        subspace = tmp_path / "q.safetensors"
        save_file({"subspace": torch.linalg.qr(torch.randn(32, 2)).Q.contiguous()}, subspace)
        checkpoint = tmp_path / f"{family}-edited"
        pipeline.bake_subspace(str(base), subspace, checkpoint)
        return base, checkpoint, subspace

    return make


def flip(checkpoint: Path, name: str) -> None:
    """Turns over the lowest bit of one stored byte of a tensor."""
    info = Checkpoint.open(checkpoint).tensors[name]
    with (checkpoint / info.file).open("r+b") as stream:
        stream.seek(info.start + info.nbytes // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_bake_wrote_passes(baked, family, dtype):
    base, checkpoint, subspace = baked(family, dtype=dtype)
    found = verify(base, checkpoint, subspace=subspace)
    assert found.faults == ()
    assert found.ok
    edits = json.loads((checkpoint / EDITS).read_text())
    assert found.edited == len(edits) > 0
    leaks = [edit["leak"] for edit in edits if edit["leak"] is not None]
    assert found.max_leak == pytest.approx(max(leaks), rel=0.05, abs=1e-6)
    assert found.foreign == ()
    every_byte = sum(p.stat().st_size for p in base.iterdir() if p.name != "README.md")
    assert found.identical_bytes + found.edited_bytes == every_byte


def test_shards_pass_and_are_compared_one_by_one(baked):
    base, checkpoint, subspace = baked("llama", shard_size="30KB")
    sizes = []
    found = verify(base, checkpoint, subspace=subspace, on_bytes=sizes.append)
    assert found.ok
    assert sizes == list(Checkpoint.open(base).file_bytes.values())
    assert len(sizes) > 1


def test_one_bit_of_a_tensor_that_was_not_edited(baked):
    base, checkpoint, subspace = baked()
    flip(checkpoint, READER)
    found = verify(base, checkpoint, subspace=subspace)
    assert [READER in fault for fault in found.faults] == [True]
    assert not found.ok


def test_one_bit_of_a_tensor_that_was_edited(baked):
    base, checkpoint, _ = baked()
    flip(checkpoint, WRITER)
    (fault,) = verify(base, checkpoint).faults
    assert "edited bytes of " + WRITER in fault


def test_one_bit_of_the_base(baked, tmp_path):
    """An edited tensor is known by both hashes, so another base cannot stand in."""
    base, checkpoint, _ = baked()
    other = Path(shutil.copytree(base, tmp_path / "other"))
    flip(other, WRITER)
    (fault,) = verify(other, checkpoint).faults
    assert "base bytes of " + WRITER in fault


def test_an_edit_that_is_not_written_down(baked):
    base, checkpoint, _ = baked()
    path = checkpoint / EDITS
    path.write_text(json.dumps([e for e in json.loads(path.read_text()) if e["name"] != WRITER]))
    (fault,) = verify(base, checkpoint).faults
    assert WRITER in fault
    assert "does not name it" in fault


def test_a_header_that_says_something_else(baked):
    base, checkpoint, _ = baked()
    path = checkpoint / "model.safetensors"
    data = path.read_bytes()
    changed = data.replace(b'"format":"pt"', b'"format":"tp"', 1)
    assert changed != data
    path.write_bytes(changed)
    (fault,) = verify(base, checkpoint).faults
    assert "header" in fault


def test_a_subspace_that_was_not_removed(baked, tmp_path):
    base, checkpoint, _ = baked()
    other = tmp_path / "other.safetensors"
    save_file({"subspace": torch.linalg.qr(torch.randn(32, 2)).Q.contiguous()}, other)
    found = verify(base, checkpoint, subspace=other)
    assert len(found.faults) == found.edited
    assert all("measured again" in fault for fault in found.faults)
    assert found.max_leak > 0.5


def test_a_leak_that_was_made_to_look_smaller(baked):
    base, checkpoint, subspace = baked(dtype=torch.bfloat16)
    edits = json.loads((checkpoint / EDITS).read_text())
    weights = load_file(checkpoint / "model.safetensors")
    weights[WRITER] = load_file(base / "model.safetensors")[WRITER]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    for edit in edits:
        if edit["name"] == WRITER:
            edit["sha256_after"] = edit["sha256_before"]
    (checkpoint / EDITS).write_text(json.dumps(edits))
    found = verify(base, checkpoint, subspace=subspace)
    assert [WRITER in fault and "1.00e+00" in fault for fault in found.faults] == [True]
    assert verify(base, checkpoint).ok  # without a subspace nobody can tell


@pytest.mark.parametrize("damage", ["missing", "short", "config", "tokenizer"])
def test_files_that_are_not_the_bases(baked, damage):
    base, checkpoint, _ = baked()
    name = {"config": "config.json", "tokenizer": "tokenizer.json"}.get(damage, "model.safetensors")
    path = checkpoint / name
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.write_text(path.read_text() + "\n")
    (fault,) = verify(base, checkpoint).faults
    assert name in fault


def test_files_that_nobody_put_there_are_named_and_are_no_fault(baked):
    base, checkpoint, _ = baked()
    (checkpoint / "notes").mkdir()
    (checkpoint / "notes" / "rollouts.jsonl").write_text("private")
    (checkpoint / ".DS_Store").write_text("")
    (checkpoint / "elsewhere").symlink_to(base)
    found = verify(base, checkpoint)
    assert found.ok
    assert found.foreign == (".DS_Store", "elsewhere", "notes/rollouts.jsonl")
    assert not set(found.foreign) & set(found.sha256)


@pytest.mark.parametrize("field", ["shape", "dtype", "file", "name", "twice"])
def test_edits_that_do_not_fit_the_base(baked, field):
    base, checkpoint, _ = baked()
    path = checkpoint / EDITS
    edits = json.loads(path.read_text())
    if field == "twice":
        edits.append(edits[0])
    else:
        wrong = {"shape": [1, 2], "dtype": "F16", "file": "other.safetensors", "name": "nothing"}
        edits[0][field] = wrong[field]
    path.write_text(json.dumps(edits))
    assert any(EDITS in fault for fault in verify(base, checkpoint).faults)


@pytest.mark.parametrize("text", [None, "{", "[1]", '[{"name": "x"}]', "7"])
def test_a_folder_without_readable_edits(baked, text):
    base, checkpoint, _ = baked()
    (checkpoint / EDITS).unlink()
    if text is not None:
        (checkpoint / EDITS).write_text(text)
    with pytest.raises(CheckpointError, match="abliterator/edits.json"):
        verify(base, checkpoint)


def test_a_subspace_of_another_model(baked, tmp_path):
    base, checkpoint, _ = baked()
    wide = tmp_path / "wide.safetensors"
    save_file({"subspace": torch.linalg.qr(torch.randn(64, 1)).Q.contiguous()}, wide)
    with pytest.raises(CheckpointError, match="64 dimensions"):
        verify(base, checkpoint, subspace=wide)
