"""MXFP4, as gpt-oss is published: two numbers a byte, edited in the layout it came in."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, Mxfp4Config

from abliterator.anatomy import anatomy_of
from abliterator.bake import bake, plan_edits
from abliterator.checkpoint import Checkpoint
from abliterator.errors import UnsupportedModel
from abliterator.formats import (
    mxfp4_blocks,
    mxfp4_numbers,
    mxfp4_rounded,
    mxfp4_scales,
)
from abliterator.recipe import Edit
from abliterator.subspace import orthonormal_basis
from tests.helpers.leak import leak_meter
from tests.helpers.tiny import randomise

D_MODEL, WIDE = 256, 256  # as wide inside as the stream, as the published models are


def quantised(weight):
    """[expert, in, out] as blocks and exponents of [expert, out, in]."""
    blocks, exponents = [], []
    for expert in weight.transpose(1, 2):
        largest = expert.unflatten(1, (-1, 32)).abs().amax(-1)
        exponent = (torch.floor(torch.log2(largest)) - 2 + 127).to(torch.uint8)
        numbers = mxfp4_rounded(expert / mxfp4_scales(exponent))
        blocks.append(mxfp4_blocks(numbers))
        exponents.append(exponent)
    return torch.stack(blocks), torch.stack(exponents)


def numbers_of(folder, name):
    stored = load_file(folder / "model.safetensors")
    pairs = zip(stored[name], stored[name.replace("_blocks", "_scales")], strict=True)
    return [(mxfp4_numbers(b) * mxfp4_scales(e)).double() for b, e in pairs]


@pytest.fixture(scope="module")
def mxfp4_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("mxfp4")
    config = GptOssConfig(
        vocab_size=64,
        hidden_size=D_MODEL,
        intermediate_size=WIDE,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_local_experts=4,
        num_experts_per_tok=4,
        layer_types=["sliding_attention", "full_attention"],
    )
    model = AutoModelForCausalLM.from_config(config)
    randomise(model)
    model.save_pretrained(folder)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith(("experts.down_proj", "experts.gate_up_proj")):
            tensors[name + "_blocks"], tensors[name + "_scales"] = quantised(tensor)
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head", "model.embed_tokens"],
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def basis():
    return orthonormal_basis(torch.randn(1, D_MODEL, generator=torch.Generator().manual_seed(3)))


def baked(folder, out, **settings):
    checkpoint = Checkpoint.open(folder)
    plan = plan_edits(checkpoint, anatomy_of(checkpoint.config), Edit(**settings))
    return bake(checkpoint, plan, basis(), out)


def test_packing_is_reversible():
    blocks = torch.randint(0, 256, (5, 3, 16), dtype=torch.uint8)
    assert torch.equal(mxfp4_blocks(mxfp4_numbers(blocks)), blocks)
    low, high = mxfp4_numbers(torch.tensor([[[0x2F] + 15 * [0]]], dtype=torch.uint8))[0, :2]
    assert (float(low), float(high)) == (-6.0, 1.0)


# magnitudes of FP4 (E2M1): OCP Microscaling Formats 1.0
STEPS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def test_rounding_against_the_sorted_numbers():
    numbers = torch.linspace(-7, 7, 501)[None]
    line = torch.tensor([sign * step for step in STEPS for sign in (-1, 1)])
    distance = (line[:, None] - numbers).abs().amin(0)
    assert torch.equal((mxfp4_rounded(numbers) - numbers).abs()[0], distance)


def test_the_leak_of_the_stored_blocks(mxfp4_folder, tmp_path):
    """Plain rounding undoes most of the edit; compensated rounding keeps it, for more noise."""
    q, noise = basis(), {}
    for rounding in ("nearest", "compensated"):
        edits = baked(mxfp4_folder, tmp_path / rounding, rounding=rounding)
        experts = [edit for edit in edits if edit.name.endswith("_blocks")]
        assert len(experts) == 2
        squares = 0.0
        for edit in experts:
            before, after = (
                torch.cat(numbers_of(f, edit.name), dim=1)
                for f in (mxfp4_folder, tmp_path / rounding)
            )
            squares += float((after - (before - q @ (q.T @ before))).square().sum())
            leak = float((q.T @ after).norm() / (q.T @ before).norm())
            assert edit.leak == pytest.approx(leak, rel=1e-3)
            assert leak > 0.3 if rounding == "nearest" else leak < 0.03
        noise[rounding] = squares**0.5
    assert noise["compensated"] < 2 * noise["nearest"]


def test_all_other_bytes_are_the_bases_scales_included(mxfp4_folder, tmp_path):
    edits = baked(mxfp4_folder, tmp_path)
    before, after = (load_file(f / "model.safetensors") for f in (mxfp4_folder, tmp_path))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {edit.name for edit in edits}


def test_transformers_loads_it_and_blocks_hardly_write_into_the_subspace(mxfp4_folder, tmp_path):
    tokens = torch.randint(4, 64, (2, 7))
    baked(mxfp4_folder, tmp_path)
    leaks = []
    for folder in (mxfp4_folder, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32
        )
        leaks.append(max(leak_meter(model.float().eval(), basis(), tokens)))
    assert leaks[1] < 0.05 * leaks[0]


def test_blocks_without_their_scales_are_refused(mxfp4_folder, tmp_path):
    stored = load_file(mxfp4_folder / "model.safetensors")
    del stored["model.layers.1.mlp.experts.down_proj_scales"]
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((mxfp4_folder / "config.json").read_bytes())
    with pytest.raises(UnsupportedModel, match=r"down_proj_blocks .* is not stored as MXFP4"):
        baked(tmp_path, tmp_path / "out")
