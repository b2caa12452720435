"""DeepSeek V4 as it is published: matrices in FP8, experts in FP4, powers of two beside both."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from abliterator.anatomy import anatomy_of
from abliterator.bake import bake, plan_edits, preview_edit
from abliterator.checkpoint import Checkpoint
from abliterator.errors import UnsupportedModel
from abliterator.formats import mxfp4_blocks, mxfp4_rounded
from abliterator.model import load_model
from abliterator.recipe import Edit
from abliterator.subspace import orthonormal_basis
from abliterator.verification import EDITS, stored_strengths, verify
from tests.helpers.architectures import D_MODEL, VOCABULARY, save
from tests.helpers.leak import leak_meter
from tests.helpers.quantised import expanded, in_blocks
from tests.helpers.tiny import train_tokenizer

BLOCK = 16
SETTINGS = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
PUBLISHED = {
    "model.embed_tokens.": "embed.",
    "model.hc_head.hc_": "hc_head_",
    ".attn.norm.": ".attn.kv_norm.",
    "model.": "",
}
FP8 = re.compile(r"\.(attn\.w|ffn\.shared_experts\.w)\w+\.weight$")
FP4 = re.compile(r"\.ffn\.experts\.\d+\.w\d\.weight$")
TOKENS = torch.randint(4, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


def basis(k=1):
    generator = torch.Generator().manual_seed(3)
    return orthonormal_basis(torch.randn(k, D_MODEL, generator=generator))


def powers(largest: torch.Tensor, of: float) -> torch.Tensor:
    return torch.exp2(torch.ceil(torch.log2(largest / of)))


def in_fp8(weight):
    scale = powers(in_blocks(weight, (BLOCK, BLOCK)), 448.0)
    return (weight / expanded(scale, weight.shape, (BLOCK, BLOCK))).to(torch.float8_e4m3fn), scale


def in_fp4(weight):
    scale = powers(weight.unflatten(1, (-1, 32)).abs().amax(-1), 6.0)
    numbers = mxfp4_rounded(weight / scale.repeat_interleave(32, dim=1))
    return mxfp4_blocks(numbers).flatten(1).view(torch.int8), scale


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = save("deepseek_v4", tmp_path_factory.mktemp("deepseek"))
    stored = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for old, new in PUBLISHED.items():
            name = name.replace(old, new)
        quantise = in_fp8 if FP8.search(name) else in_fp4 if FP4.search(name) else None
        if quantise is None:
            stored[name] = tensor
            continue
        stored[name], scale = quantise(tensor)
        stored[name.removesuffix("weight") + "scale"] = scale.to(torch.float8_e8m0fnu)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": SETTINGS, "expert_dtype": "fp4"}
    (folder / "config.json").write_text(json.dumps(config))
    train_tokenizer().save_pretrained(folder)
    return folder


def planned(folder, way="keep"):
    checkpoint = Checkpoint.open(folder)
    return checkpoint, plan_edits(
        checkpoint, anatomy_of(checkpoint.config), Edit(quantized=way, rounding="compensated")
    )


@pytest.mark.parametrize("way", ["keep", "dequantize"])
def test_it_is_edited_as_published(base, tmp_path, way):
    checkpoint, plan = planned(base, way)
    kinds = {edit.layout.kind for edit in plan.edits}
    assert kinds == {"FP8, a scale a block", "MXFP4"}
    edits = bake(checkpoint, plan, basis(), tmp_path / "out")
    # random matrices of 32 rows leave rounding little to choose from
    assert max(edit.leak for edit in edits) < (0.1 if way == "keep" else 1e-3)
    report = tmp_path / "out" / EDITS
    report.parent.mkdir()
    report.write_text(json.dumps([edit.model_dump(mode="json") for edit in edits]))
    assert verify(base, tmp_path / "out").faults == ()
    for strength in stored_strengths(base, tmp_path / "out", basis()):
        wanted = 0 if strength.component == "embedding" else 1
        assert strength.strength == pytest.approx(wanted, abs=0.05)

    loaded = load_model(base, device="cpu", dtype="float32")
    with torch.inference_mode(), preview_edit(loaded, plan, basis()):
        wanted = loaded.model(TOKENS).logits
    edited = load_model(tmp_path / "out", device="cpu", dtype="float32")
    with torch.inference_mode():
        untouched, got = loaded.model(TOKENS).logits, edited.model(TOKENS).logits
    far = float((wanted - untouched).norm() / wanted.norm())
    off = float((got - wanted).norm() / wanted.norm())
    assert off < far / 2
    if way == "dequantize":
        assert max(leak_meter(edited.model, basis(), TOKENS)) < 1e-2
        dtypes = {info.dtype for info in Checkpoint.open(tmp_path / "out").tensors.values()}
        assert "I8" not in dtypes  # a block's experts are one module: all of them became plain


def test_scales_of_another_size_are_named(base, tmp_path):
    stored = load_file(base / "model.safetensors")
    name = "layers.1.ffn.experts.2.w2.scale"
    stored[name] = stored[name].view(torch.uint8)[:, :1].contiguous().view(torch.float8_e8m0fnu)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    with pytest.raises(
        UnsupportedModel, match=r"experts\.2\.w2\.weight .* stored as I8 with scales"
    ):
        planned(tmp_path)


def test_scales_without_a_config_that_explains_them_are_named(base, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    config = json.loads((base / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=r"\.scale that is not known"):
        planned(tmp_path)
