"""Edits of modules' own (U and V): computed again from base and file; every damage is named."""

import json
import re

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from abliterator import pipeline
from abliterator.bake import write_adapter
from abliterator.checkpoint import Checkpoint
from abliterator.cli import main
from abliterator.directions import load_subspace
from abliterator.errors import CheckpointError, DirectionError
from abliterator.files import sha256_of_bytes
from abliterator.verification import DIRECTIONS, EDITS, stored_strengths, verify, verify_adapter
from tests.helpers import architectures, quantised
from tests.helpers.pairs import baked_with_pairs, planned, random_pairs

WRITER = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def baked(tmp_path, tiny_folder):
    """`baked(family, **options)`: base and checkpoint."""

    def make(family="llama", **options):
        base, out = tiny_folder(family, **options), tmp_path / "out"
        baked_with_pairs(base, out)
        return base, out

    return make


def faults(base, out, **options):
    return list(verify(base, out, **options).faults)


@pytest.mark.parametrize("family", ["llama", "llama_biased", "phi3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_bake_wrote_passes(baked, family, dtype):
    base, out = baked(family, dtype=dtype)
    proof = verify(base, out)
    assert proof.faults == ()
    assert proof.max_leak is None
    assert 0.5 < proof.max_apart < 2


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "mixtral", "qwen3_moe", "gpt_oss"])
def test_gains_other_axes_and_experts_pass(name, tmp_path):
    base = architectures.save(name, tmp_path / "base", dtype=torch.bfloat16)
    baked_with_pairs(base, tmp_path / "out")
    assert faults(base, tmp_path / "out") == []


@pytest.mark.parametrize("way", ["keep", "dequantize"])
@pytest.mark.parametrize("name", ["fp8_block", "int4_row", "nvfp4", "mxfp4"])
def test_quantised_tensors_pass(name, way, tmp_path):
    base = quantised.save_quantised(name, tmp_path / "base")
    edits = baked_with_pairs(base, tmp_path / "out", quantized=way)
    assert any(edit.storage for edit in edits)
    assert faults(base, tmp_path / "out") == []
    stated = next(edit for edit in edits if edit.storage)
    path = tmp_path / "out" / EDITS
    path.write_text(path.read_text().replace(str(stated.noise), str(stated.noise / 2)))
    (fault,) = faults(base, tmp_path / "out")
    assert f"{stated.name} has a noise of" in fault


def test_the_command_says_that_no_subspace_is_promised(baked):
    base, out = baked()
    done = CliRunner().invoke(main, ["verify", str(out), "--base", str(base)])
    assert done.exit_code == 0, done.output
    assert "no shared subspace is promised to be absent" in done.output
    assert "leak" not in done.output


def rewrite_edits(out, change):
    path = out / EDITS
    edits = json.loads(path.read_text())
    for edit in edits:
        if edit["name"] == WRITER:
            change(edit)
    path.write_text(json.dumps(edits))


def rewrite_directions(out, change=lambda tensors, sites: None, **metadata):
    path = out / DIRECTIONS
    with safe_open(path, "pt") as file:
        kept = file.metadata()
    tensors, sites = load_file(path), json.loads(kept["sites"])
    change(tensors, sites)
    save_file(tensors, path, metadata=kept | {"sites": json.dumps(sites)} | metadata)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_tensor_that_is_not_its_edit_is_named_though_its_hash_is_right(baked, dtype):
    base, out = baked(dtype=dtype)
    info = Checkpoint.open(out).tensors[WRITER]
    with (out / info.file).open("r+b") as stream:
        stream.seek(info.start)
        data = bytearray(stream.read(info.nbytes))
        weight = torch.frombuffer(data, dtype=dtype)
        weight[: len(weight) // 8] *= 1.01
        stream.seek(info.start)
        stream.write(data)
    assert any("has the hash of" in fault for fault in faults(base, out))
    rewrite_edits(out, lambda edit: edit.update(sha256_after=sha256_of_bytes(data)))
    (fault,) = faults(base, out)
    assert fault.startswith(f"{WRITER}: what is stored is ")
    assert "rounding explains" in fault


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"change": None}, "has a change of .* says nothing of it"),
        ({"change": 0.9}, r"has a change of .* says 9\.00e-01"),
        ({"strength": 0.4}, r"strength 0\.4; in .* the strength"),
        ({"k": 3}, "rank 3 and strength"),
        ({"subspace": "all"}, "lost a subspace, where other tensors have edits of their own"),
    ],
)
def test_edits_that_say_something_else(change, says, baked):
    base, out = baked()
    rewrite_edits(out, lambda edit: edit.update(change))
    (fault,) = faults(base, out)
    assert WRITER in fault
    assert re.search(says, fault), fault


MODULE = WRITER.removesuffix(".weight")


def other_numbers(tensors, sites):
    tensors[f"{MODULE}.take"] = 1.02 * tensors[f"{MODULE}.take"]


def without_site(tensors, sites):
    sites[:] = [site for site in sites if site["module"] != MODULE]


def other_strength(tensors, sites):
    next(site for site in sites if site["module"] == MODULE)["strength"] += 0.1


def tensor_as(make):
    def change(tensors, sites):
        tensors[f"{MODULE}.read"] = make(tensors[f"{MODULE}.read"])

    return change


def gone(tensors, sites):
    del tensors[f"{MODULE}.read"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (other_numbers, "what is stored is"),
        (without_site, "has no U and V for it"),
        (other_strength, "in abliterator/directions.safetensors U and V are"),
        (gone, "is damaged: KeyError"),
        (tensor_as(lambda read: read * float("nan")), "not finite"),
        (tensor_as(lambda read: read * float("inf")), "not finite"),
        (tensor_as(lambda read: (100 * read).long()), "none that are real"),
        (tensor_as(lambda read: read[:16].clone()), "does not fit"),
        (tensor_as(lambda read: read[:, :1].clone()), "have several ranks"),
        (tensor_as(lambda read: read[:, 0].clone()), "does not fit"),
        (tensor_as(lambda read: read.expand(2, -1, -1).clone()), "in .* U and V are"),
        (tensor_as(lambda read: read[:, :0].clone()), "have several ranks"),
    ],
)
def test_a_file_of_directions_that_is_not_of_this_edit(change, says, baked):
    base, out = baked()
    rewrite_directions(out, change)
    (fault,) = faults(base, out)
    assert re.search(says, fault), fault


def test_without_the_file_of_directions_nothing_is_proven(baked):
    base, out = baked()
    (out / DIRECTIONS).unlink()
    (fault,) = faults(base, out)
    assert fault.startswith("The edited tensors cannot be computed again. Cannot read directions")


def test_an_adapter_of_the_same_edit_passes(baked, tmp_path):
    base, out = baked(dtype=torch.bfloat16)
    checkpoint, _, plan = planned(base)
    pairs, adapter = random_pairs(plan, checkpoint), tmp_path / "adapter"
    write_adapter(checkpoint, plan, pairs, adapter, base_model="me/base")
    assert verify_adapter(base, out, adapter).faults == ()
    write_adapter(checkpoint, plan, pairs.flip(0), adapter, base_model="me/base")
    assert len(verify_adapter(base, out, adapter).faults) > 3


# ---- what takes a subspace


@pytest.fixture
def pairs_file(tmp_path, tiny_folder):
    checkpoint, _, plan = planned(tiny_folder())
    path = tmp_path / "pairs.safetensors"
    save_file({"subspace": random_pairs(plan, checkpoint)}, path)
    return path


def test_what_measures_or_bakes_a_subspace_names_pairs(baked, pairs_file, tmp_path):
    base, out = baked()
    assert verify(base, out, subspace=pairs_file).ok  # that of a build, which has no other
    with pytest.raises(DirectionError, match="Only the recipe that made it bakes it"):
        pipeline.bake_subspace(str(base), pairs_file, tmp_path / "alone")
    basis = load_file(pairs_file)["subspace"]
    with pytest.raises(CheckpointError, match="and no subspace that all lost"):
        stored_strengths(base, out, basis)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        (torch.ones(7, 3, 32, 1), r"as torch\.float32 \[7, 3, 32, 1\]"),
        (torch.ones(7, 2, 32, 1, dtype=torch.int32), "floating-point"),
        (torch.full((7, 2, 32, 1), torch.nan), "not finite"),
        (torch.full((7, 2, 32, 1), torch.inf), "not finite"),
        (torch.ones(7, 2, 32, 0), "r is 0"),
        (torch.ones(0, 2, 32, 1), "n_modules is 0"),
    ],
)
def test_pairs_that_are_none(columns, says, tmp_path):
    save_file({"subspace": columns}, tmp_path / "q.safetensors")
    with pytest.raises(DirectionError, match=says):
        load_subspace(tmp_path / "q.safetensors")
