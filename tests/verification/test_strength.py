"""The effective strength of edits that abliterator made, and of edits that others made."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config

from abliterator import pipeline
from abliterator.anatomy import anatomy_of
from abliterator.bake import bake, plan_edits
from abliterator.checkpoint import Checkpoint
from abliterator.cli import main
from abliterator.errors import CheckpointError, UnsupportedModel
from abliterator.model import load_model
from abliterator.recipe import Edit
from abliterator.subspace import orthonormal_basis
from abliterator.verification import measured_strengths, stored_strengths
from tests.helpers import architectures, tiny
from tests.helpers.architecture_sizes import WANTED
from tests.helpers.quantised import D_MODEL, save_quantised

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")

LOAD = partial(load_model, device="cpu", dtype="float32")
TEXTS = ("the cat sat on the mat and looked at it", "rain fell on the hills")


def basis(width: int = 32, k: int = 2, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return orthonormal_basis(torch.randn(k, width, generator=generator)).contiguous()


def edited_by_hand(base: Path, out: Path, q: torch.Tensor, strength: float) -> Path:
    """Every o_proj and down_proj W of a Llama as W - s Q Qᵀ W, as other tools write it."""
    shutil.copytree(base, out)
    path = out / "model.safetensors"
    tensors = load_file(path)
    for name, weight in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            wide = weight.double()
            tensors[name] = (wide - strength * q @ (q.T @ wide)).to(weight.dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    return out


def of_blocks(strengths):
    return [s for s in strengths if s.layer >= 0]


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 2.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_strength_of_an_edit_by_hand_is_measured(tiny_folder, tmp_path, strength, dtype):
    base = tiny_folder("llama", dtype=dtype)
    edited = edited_by_hand(base, tmp_path / "edited", basis(), strength)
    found = of_blocks(stored_strengths(base, edited, basis()))
    assert {s.component for s in found} == {"attention", "mlp"}
    for entry in found:
        assert entry.strength == pytest.approx(strength, abs=1e-3)
        assert entry.leak == pytest.approx(abs(1 - strength), abs=1e-2)
        if strength:
            assert entry.change_within == pytest.approx(1, abs=1e-3)
        else:
            assert entry.change_within is None


def test_another_direction_was_not_removed(tiny_folder, tmp_path):
    base = tiny_folder("llama")
    edited = edited_by_hand(base, tmp_path / "edited", basis(seed=3), 1.0)
    others = of_blocks(stored_strengths(base, edited, basis(seed=4)))
    assert max(s.strength for s in others) < 0.5
    assert max(s.change_within for s in others) < 0.5


@pytest.fixture
def gemma2(monkeypatch, tmp_path, tiny_tokenizer):
    """A tiny Gemma 2: a norm with a random gain stands behind every writer."""
    monkeypatch.setitem(tiny.CONFIGS, "gemma2", lambda: Gemma2Config(**tiny._SIZES))
    return tiny.save_tiny("gemma2", tmp_path / "gemma2", tiny_tokenizer)


def our_edit(base: Path, out: Path, width: int = 32) -> Path:
    save_file({"subspace": basis(width)}, out.parent / "q.safetensors")
    pipeline.bake_subspace(str(base), out.parent / "q.safetensors", out)
    return out


@pytest.mark.parametrize("name", ["gemma2", "mixtral", "gpt_oss", "gpt2", "olmo2", "qwen3_moe"])
def test_our_own_edit_has_strength_1_whatever_the_architecture(tmp_path, name):
    base = architectures.save(name, tmp_path / "base")
    edited = our_edit(base, tmp_path / "edited", architectures.D_MODEL)
    found = of_blocks(stored_strengths(base, edited, basis(architectures.D_MODEL)))
    assert found
    for entry in found:
        assert entry.strength == pytest.approx(1, abs=1e-3)
        assert entry.leak < 1e-3


@pytest.mark.parametrize("family", ["llama", "llama_biased", "gemma2"])
def test_a_pass_finds_strength_1_of_our_own_edit(request, tiny_folder, tmp_path, family):
    base = request.getfixturevalue("gemma2") if family == "gemma2" else tiny_folder(family)
    edited = our_edit(base, tmp_path / "edited")
    for entry in measured_strengths(base, edited, basis(), TEXTS, load=LOAD):
        assert entry.strength == pytest.approx(1, abs=1e-3)
        assert entry.leak < 1e-3


def test_an_edit_that_ignores_the_norm_behind_a_writer_is_no_removal(gemma2, tmp_path):
    edited = edited_by_hand(gemma2, tmp_path / "edited", basis(), 1.0)
    assert min(s.leak for s in of_blocks(stored_strengths(gemma2, edited, basis()))) > 0.02
    assert min(s.leak for s in measured_strengths(gemma2, edited, basis(), TEXTS, load=LOAD)) > 0.02


@pytest.mark.parametrize("strength", [0.0, 0.5, 2.4])
def test_a_pass_tells_left_from_removed_from_inverted(tiny_folder, tmp_path, strength):
    base = tiny_folder("llama")
    edited = edited_by_hand(base, tmp_path / "edited", basis(), strength)
    for entry in measured_strengths(base, edited, basis(), TEXTS, load=LOAD):
        # attention changes what the block's own MLP reads, so it is not exact
        assert entry.strength == pytest.approx(strength, abs=1e-6 if strength == 0 else 0.3)


@pytest.mark.parametrize("name", ["deepseek_v4", "qwen4_exp_text"])
@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_a_pass_through_several_streams_is_exact(
    tmp_path, tiny_tokenizer, monkeypatch, name, strength
):
    """Every sublayer gets the base's inputs, so it is the writers' own strength."""
    monkeypatch.setitem(WANTED, "vocab_size", tiny.VOCABULARY)
    base, out = architectures.save(name, tmp_path / "base"), tmp_path / "edited"
    tiny_tokenizer.save_pretrained(base)
    checkpoint = Checkpoint.open(base)
    settings = Edit(strength={"attention": strength, "mlp": strength})
    bake(checkpoint, plan_edits(checkpoint, anatomy_of(checkpoint.config), settings), basis(), out)
    tiny_tokenizer.save_pretrained(out)
    found = measured_strengths(base, out, basis(), TEXTS, load=LOAD)
    assert [entry.layer for entry in found] == [0, 1, 2]
    for entry in found:
        assert entry.strength == pytest.approx(strength, abs=1e-4)
        assert entry.leak == pytest.approx(abs(1 - strength), abs=1e-4)


@pytest.mark.parametrize("name", ["gemma3n_text", "minimax"])
def test_a_pass_through_a_model_that_is_edited_in_part(tmp_path, tiny_tokenizer, monkeypatch, name):
    """Gemma 3n's sublayers are told from its copies of the stream; MiniMax-01's blocks are not."""
    monkeypatch.setitem(WANTED, "vocab_size", tiny.VOCABULARY)
    monkeypatch.setitem(WANTED, "vocab_size_per_layer_input", tiny.VOCABULARY)
    base, out = architectures.save(name, tmp_path / "base"), tmp_path / "edited"
    tiny_tokenizer.save_pretrained(base)
    checkpoint = Checkpoint.open(base)
    plan = plan_edits(checkpoint, anatomy_of(checkpoint.config), Edit(partial=True))
    bake(checkpoint, plan, basis(), out)
    tiny_tokenizer.save_pretrained(out)
    stored = of_blocks(stored_strengths(base, out, basis()))
    assert all(entry.strength == pytest.approx(1, abs=1e-4) for entry in stored)
    if name == "minimax":
        with pytest.raises(UnsupportedModel, match="without `--run`"):
            measured_strengths(base, out, basis(), TEXTS, load=LOAD)
        return
    for entry in measured_strengths(base, out, basis(), TEXTS, load=LOAD):
        assert entry.strength == pytest.approx(1, abs=1e-4)
        assert entry.leak < 1e-4


FORMATS = ("fp8_block", "compressed_row", "fp8_block experts", "mxfp4")
PACKED = ("int4_group", "modelopt", "gptq", "awq")


@pytest.mark.parametrize("name", [*FORMATS, *PACKED])
@pytest.mark.parametrize("quantized", ["keep", "dequantize"])
def test_formats_are_read_as_transformers_reads_them(tmp_path, tiny_tokenizer, name, quantized):
    """Nearest rounding, which restores a part of a direction: measured on both, and equal."""
    base = save_quantised(name, tmp_path / "base", vocabulary=tiny.VOCABULARY)
    tiny_tokenizer.save_pretrained(base)
    out, q = tmp_path / "out", basis(D_MODEL, 1)
    checkpoint = Checkpoint.open(base)
    settings = Edit(rounding="nearest", quantized=quantized)
    bake(checkpoint, plan_edits(checkpoint, anatomy_of(checkpoint.config), settings), q, out)
    found = {(s.layer, s.component): s for s in of_blocks(stored_strengths(base, out, q))}
    weights = [dict(LOAD(folder).model.named_parameters()) for folder in (base, out)]
    for layer in range(2):
        module = f"model.layers.{layer}.self_attn.o_proj.weight"
        before, after = (w[module].double() for w in weights)
        if name == "mxfp4":  # its attention has biases, which are written too
            biases = (w[module.replace("weight", "bias")].double() for w in weights)
            before, after = (
                torch.cat([w, b[:, None]], 1) for w, b in zip((before, after), biases, strict=True)
            )
        old, new = q.T @ before, q.T @ after
        expected = 1 - float((old * new).sum() / (old * old).sum())
        assert found[layer, "attention"].strength == pytest.approx(expected, abs=1e-3)
        leak = float(new.norm() / old.norm())
        assert found[layer, "attention"].leak == pytest.approx(leak, abs=1e-3)


def test_each_block_may_have_a_subspace_of_its_own(tiny_folder, tmp_path):
    base = tiny_folder("llama")
    n_layers = anatomy_of(Checkpoint.open(base).config).n_layers
    bases = torch.stack([basis(k=1, seed=i) for i in range(n_layers)])
    save_file({"subspace": bases}, tmp_path / "q.safetensors")
    pipeline.bake_subspace(str(base), tmp_path / "q.safetensors", tmp_path / "edited")
    found = stored_strengths(base, tmp_path / "edited", bases)
    assert {s.layer for s in found} == set(range(n_layers))
    assert all(s.strength == pytest.approx(1, abs=1e-3) for s in found)
    with pytest.raises(CheckpointError, match=f"each of {n_layers - 1} blocks"):
        stored_strengths(base, tmp_path / "edited", bases[1:])


def test_models_that_do_not_belong_together_are_named(tiny_folder):
    llama, biased = tiny_folder("llama"), tiny_folder("llama_biased")
    with pytest.raises(CheckpointError, match=r"16 dimensions, and .* writes 32"):
        stored_strengths(llama, llama, basis(16))
    with pytest.raises(CheckpointError, match=r"no tensor for .*bias"):
        stored_strengths(biased, llama, basis())


def test_the_command_prints_and_gives_json(tiny_folder, tmp_path):
    base = tiny_folder("llama")
    edited = edited_by_hand(base, tmp_path / "edited", basis(), 2.4)
    save_file({"subspace": basis()}, tmp_path / "q.safetensors")
    arguments = ["leak", str(base), str(edited), "--subspace", str(tmp_path / "q.safetensors")]
    text = CliRunner().invoke(main, arguments)
    assert text.exit_code == 0, text.output
    assert "attention: strength 2.4000 to 2.4000" in text.stdout
    run = CliRunner().invoke(main, [*arguments, "--run", "--device", "cpu", "--json"])
    result = json.loads(run.stdout)
    assert {entry["component"] for entry in result["measured"]} == {"block"}
    assert all(entry["strength"] > 2 for entry in result["measured"])
