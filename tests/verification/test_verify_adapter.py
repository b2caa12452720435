"""The adapter's proof: what `write_adapter` wrote passes, and every forgery is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from abliterator.anatomy import anatomy_of
from abliterator.bake import bake, plan_edits, write_adapter
from abliterator.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoint
from abliterator.errors import CheckpointError
from abliterator.pipeline.stages.bake import edits_json
from abliterator.recipe import Edit
from abliterator.subspace import orthonormal_basis
from abliterator.verification import EDITS, verify_adapter
from tests.helpers.architectures import save
from tests.helpers.tiny import D_MODEL

A = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")


def made(base: Path, folder: Path, k: int, **settings) -> tuple[Path, Path, Path, Path]:
    """(base, checkpoint, adapter, subspace file) of one random edit."""
    basis = orthonormal_basis(torch.randn(k, D_MODEL, generator=torch.Generator().manual_seed(3)))
    opened = Checkpoint.open(base)
    plan = plan_edits(opened, anatomy_of(opened.config), Edit(**settings))
    edits = bake(opened, plan, basis, folder / "checkpoint")
    (folder / "checkpoint" / "abliterator").mkdir()
    (folder / "checkpoint" / EDITS).write_text(edits_json(edits))
    write_adapter(opened, plan, basis, folder / "adapter", base_model="me/base")
    save_file({"subspace": basis.contiguous()}, folder / "q.safetensors")
    return base, folder / "checkpoint", folder / "adapter", folder / "q.safetensors"


def faults(folders: tuple[Path, Path, Path, Path], *, without: bool = False) -> tuple[str, ...]:
    base, checkpoint, adapter, subspace = folders
    found = verify_adapter(base, checkpoint, adapter, subspace=None if without else subspace)
    return found.faults


@pytest.fixture
def folders(tiny_folder, tmp_path):
    return made(tiny_folder("llama", dtype=torch.bfloat16), tmp_path, 3)


@pytest.mark.parametrize("rounding", ["compensated", "nearest"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("k", [1, 3])
def test_what_was_written_passes(tiny_folder, tmp_path, k, dtype, rounding):
    strength = {"attention": 1.0, "mlp": 0.7}
    base = tiny_folder("llama", dtype=dtype)
    folders = made(base, tmp_path, k, rounding=rounding, strength=strength)
    found = verify_adapter(*folders[:3], subspace=folders[3])
    assert found.faults == ()
    assert found.ok
    assert found.modules == 6
    assert found.foreign == ()
    assert set(found.sha256) == {ADAPTER_CONFIG, ADAPTER_WEIGHTS}
    assert found.max_leak == pytest.approx(0.3, abs=1e-5)  # of the mlp
    if rounding == "nearest" and dtype != torch.float32:
        assert found.max_apart == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_gains_after_a_writer_count(name, tmp_path):
    assert faults(made(save(name, tmp_path / "base"), tmp_path, 3)) == ()


def changed_config(config: dict, change: str) -> dict:
    return {
        "scale": {**config, "lora_alpha": 6},
        "pattern": {**config, "alpha_pattern": {"down_proj": 9}},
        "modules": {**config, "modules_to_save": ["lm_head"]},
        "less": {**config, "target_modules": config["target_modules"][1:]},
        "text": {**config, "note": "x"},
        "nobody": {**config, "base_model_name_or_path": None},
        "list": [config],
    }[change]


@pytest.mark.parametrize(
    "change", ["scale", "pattern", "modules", "less", "text", "nobody", "list", "spaces", "gone"]
)
def test_one_config_is_allowed(folders, change):
    path = folders[2] / ADAPTER_CONFIG
    if change == "gone":
        path.unlink()
    elif change == "spaces":
        path.write_text(path.read_text() + " ")
    else:
        path.write_text(json.dumps(changed_config(json.loads(path.read_text()), change), indent=1))
    (fault,) = faults(folders)
    assert fault.startswith(ADAPTER_CONFIG)


def forge(folders: tuple[Path, ...], change: str) -> None:
    path = folders[2] / ADAPTER_WEIGHTS
    tensors, metadata = load_file(path), {"format": "pt"}
    if change == "scaled":
        tensors[B] *= 1.001
    elif change == "one element":
        tensors[B][5, 0] += 0.01
    elif change == "zero":
        tensors[A].zero_()
    elif change == "not a number":
        tensors[A][0, 0] = float("nan")
    elif change == "another tensor":
        tensors[A.replace("down", "up")] = torch.zeros(1)
    elif change == "a tensor less":
        del tensors[A]
    elif change == "half precision":
        tensors[A] = tensors[A].half()
    elif change == "rank":
        tensors[A], tensors[B] = tensors[A][:2].clone(), tensors[B][:, :2].clone()
    elif change == "text in the header":
        metadata = {**metadata, "note": "x"}
    save_file(tensors, path, metadata=metadata)
    if change == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    elif change == "gone":
        path.unlink()


FORGED = {
    "scaled": "leak",
    "one element": "leak",
    "zero": "from the checkpoint's",
    "not a number": "from the checkpoint's",
    "another tensor": "no edit asks for",
    "a tensor less": "has no",
    "half precision": "has no",
    "rank": "has no",
    "text in the header": "more than its tensors",
    "cut": "no sound safetensors",
    "gone": "is missing",
}


@pytest.mark.parametrize("change", FORGED)
def test_a_forged_adapter_is_found(folders, change):
    assert faults(folders) == ()
    forge(folders, change)
    assert FORGED[change] in " ".join(faults(folders))


def test_without_the_subspace_what_rounding_hides_is_hidden_and_no_more(folders):
    forge(folders, "scaled")
    assert faults(folders, without=True) == ()  # a thousandth of the edit, below a step of bfloat16
    tensors = load_file(folders[2] / ADAPTER_WEIGHTS)
    tensors[B] *= 1.1
    save_file(tensors, folders[2] / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (fault,) = faults(folders, without=True)
    assert "model.layers.1.mlp.down_proj.weight: base and adapter give weights" in fault


def test_files_that_do_not_belong_to_it_are_named(folders):
    (folders[2] / "notes.txt").write_text("x")
    (folders[2] / "README.md").write_text("x")
    found = verify_adapter(*folders[:3])
    assert found.ok
    assert found.foreign == ("notes.txt",)
    assert "README.md" in found.sha256


def test_an_edit_that_has_no_adapter(folders):
    path = folders[1] / EDITS
    edits = json.loads(path.read_text())
    edits[0]["axis"] = 1
    path.write_text(json.dumps(edits))
    with pytest.raises(CheckpointError, match="no low-rank form"):
        faults(folders)
