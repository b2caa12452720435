"""`abliterator plan`, sentence by sentence: what it finds, what it costs, and what stops it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from abliterator.cli import main
from tests.helpers.architectures import save
from tests.helpers.quantised import save_quantised


def plan(folder, *options):
    return CliRunner().invoke(main, ["plan", str(folder), *options])


def told(folder, *options):
    done = plan(folder, *options, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def change(folder: Path, tensors=(), **config):
    """Adds tensors by name, or takes those away whose value is None; and changes config.json."""
    path = folder / "model.safetensors"
    found = load_file(path) | dict(tensors)
    kept = {name: tensor for name, tensor in found.items() if tensor is not None}
    save_file(kept, path, metadata={"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, **config}))
    return folder


def weight(*shape):
    return torch.zeros(*shape)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("llama", {}, {"embedding": 1, "attention": 3, "mlp": 3}),
        ("llama", {"max_shard_size": "20KB"}, {"embedding": 1, "attention": 3, "mlp": 3}),
        # Conv1D, each with a bias, and the positions' embedding
        ("gpt2", {}, {"embedding": 2, "attention": 6, "mlp": 6}),
        # 3 blocks x 4 experts; and the same experts in one tensor a block, in either axis order
        ("mixtral-square", {}, {"embedding": 1, "attention": 3, "expert": 12}),
        (
            "mixtral-square",
            {"save_original_format": False},
            {"embedding": 1, "attention": 3, "expert": 3},
        ),
        ("gpt_oss-square", {}, {"embedding": 1, "attention": 6, "expert": 6}),
        (
            "deepseek_v3",
            {},
            {"embedding": 1, "attention": 3, "mlp": 1, "expert": 8, "shared_expert": 2},
        ),
    ],
)
def test_writers_found_are_those_expected(name, options, expected, tmp_path):
    folder = save(name, tmp_path / "m", **options)
    writers = told(folder)["writers"]
    assert {component: counts["expected"] for component, counts in writers.items()} == expected
    assert all(counts["tensors"] == counts["expected"] for counts in writers.values())
    assert all(c["edited"] == (c["tensors"] if n != "embedding" else 0) for n, c in writers.items())
    shown = plan(folder).stdout
    assert f"attention: {expected['attention']} of {expected['attention']} tensors" in shown
    assert ("4 experts a block" in shown) == ("expert" in expected)


def test_what_an_edit_of_several_streams_promises_is_a_note(tmp_path):
    notes = told(save("hy_v4", tmp_path / "m"))["notes"]
    (note,) = [note for note in notes if "several residual streams" in note]
    assert "nothing is promised of the streams themselves" in note
    assert "several residual streams" not in str(told(save("llama", tmp_path / "l"))["notes"])


def test_a_missing_expert_stops_it_and_is_counted(tmp_path):
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    folder = change(save("mixtral", tmp_path / "m"), {name: None})
    done = plan(folder)
    assert done.exit_code == 1
    assert f"no tensor {name}," in done.stderr
    assert "Of the 12 tensors of the component expert, 11 are there" in done.stderr


def test_missing_gains_and_writers_are_counted_together(tmp_path):
    lost = [f"model.layers.{n}.post_attention_layernorm.weight" for n in (1, 2)]
    folder = change(save("gemma2", tmp_path / "m"), dict.fromkeys(lost))
    done = plan(folder)
    assert done.exit_code == 1
    assert f"no tensor {lost[0]} (nor 1 more)" in done.stderr
    assert "Of the 6 tensors of the component attention, 4 are there" in done.stderr


@pytest.mark.parametrize(
    ("extra", "label"),
    [
        ("mtp.layers.0.mlp.down_proj.weight", "blocks that predict further tokens (MTP)"),
        ("model.layers.3.mlp.down_proj.weight", "blocks that predict further tokens (MTP)"),
        ("draft_model.layers.0.mlp.down_proj.weight", "draft modules"),
        ("medusa_head.0.0.linear.weight", "draft modules"),
    ],
)
def test_what_predicts_or_drafts_is_named_and_left_alone(extra, label, tmp_path):
    folder = save("deepseek_v3", tmp_path / "m")
    change(folder, {extra: weight(32, 48)}, num_nextn_predict_layers=1)
    assert told(folder)["left_alone"] == {label: 1}
    assert f"left alone   1 tensors: {label}" in plan(folder).stdout


def test_an_unknown_writer_stops_it(tmp_path):
    name = "model.layers.0.mlp.extra_proj.weight"
    done = plan(change(save("llama", tmp_path / "m"), {name: weight(32, 48)}))
    assert done.exit_code == 1
    assert f"has a tensor {name} that is not known for model_type 'llama'" in done.stderr


@pytest.mark.parametrize("copied", [False, True])
def test_a_tied_embedding_is_told_and_not_edited_twice(copied, tmp_path):
    folder = save("gemma", tmp_path / "m")
    if copied:
        table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
        change(folder, {"lm_head.weight": table})
    assert told(folder)["tied_embeddings"]
    assert "the output head too (tied); none edited" in plan(folder).stdout
    done = plan(folder, "--set", "edit.embeddings=true")
    assert done.exit_code == 1
    assert "also the output head of this model (tied)" in done.stderr


def test_the_edit_of_a_model_without_a_recipe_can_be_set(tmp_path):
    folder = save("llama", tmp_path / "m")
    assert "the output head" not in plan(folder).stdout
    writers = told(
        folder, "--set", "edit.embeddings=true", "--set", "edit.strength={attention: 1, mlp: 0}"
    )
    assert [counts["edited"] for counts in writers["writers"].values()] == [1, 3, 0]
    done = plan(folder, "--set", "layers=[1]")
    assert done.exit_code == 1
    assert "Only `edit` can be set here" in done.stderr


def test_a_refused_type_is_told_with_its_reason_alone(tmp_path):
    done = plan(change(save("llama", tmp_path / "m"), model_type="dory"))
    assert done.exit_code == 1
    assert "its blocks scale what they write and the stream itself" in done.stderr
    assert len(done.stderr) < 300


# In a process of its own: what it holds at most, less what it held before.
_BAKE = """
import re, sys
from pathlib import Path
import torch
from abliterator.anatomy import anatomy_of
from abliterator.bake import bake, plan_edits
from abliterator.recipe import Edit
from abliterator.checkpoint import Checkpoint
from abliterator.subspace import orthonormal_basis

folder, out, rounding = sys.argv[1:]
checkpoint = Checkpoint.open(Path(folder))
plan = plan_edits(checkpoint, anatomy_of(checkpoint.config), Edit(rounding=rounding))
basis = orthonormal_basis(torch.randn(16, plan.d_model))

def kilobytes(of):
    return int(re.search(rf"{of}:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))

before = kilobytes("VmRSS")
bake(checkpoint, plan, basis, Path(out))
print((kilobytes("VmHWM") - before) * 1024)  # getrusage's begins with that of the parent
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the resident set is read from /proc")
@pytest.mark.parametrize(
    ("stored", "rounding"),
    [
        (torch.bfloat16, "compensated"),
        (torch.float32, "compensated"),
        (torch.float32, "nearest"),
        ("fp8_block", "compensated"),
        ("mxfp4", "nearest"),
    ],
)
def test_the_memory_that_is_stated_is_enough_and_not_far_from_it(stored, rounding, tmp_path):
    folder = tmp_path / "m"
    if stored in ("fp8_block", "mxfp4"):
        save_quantised(stored, folder, d_model=2048, n_layers=1)
    else:
        _save_wide(folder, stored)
    arguments = [sys.executable, "-c", _BAKE, folder, tmp_path / "out", rounding]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stated = told(folder, "--set", f"edit.rounding={rounding}")["bake_memory"]
    assert 0.2 * stated < int(done.stdout) < stated, done.stdout


def _save_wide(folder, dtype):
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=1024,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=64,
    )
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
