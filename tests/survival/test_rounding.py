"""Formats of compressed-tensors: the loader's own decoding is the oracle."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig

from abliterator.checkpoint import Checkpoint
from abliterator.errors import QuantizationError
from abliterator.survival import (
    formats_named,
    require_plain,
    rounding_of,
    surviving_strengths,
    write_rounded,
)
from tests.helpers.quantised import save_quantised
from tests.survival.models import CONFIG, save_model, weights_of

NAMES = ["fp8", "int8", "int4"]


def rounded(source, tmp_path, name):
    """The folder of the format, that of its numbers, and how it was rounded."""
    (entry,) = formats_named([name])
    rounding = rounding_of(source, entry)
    packed, numbers = tmp_path / "packed", tmp_path / "numbers"
    n_bytes = write_rounded(source, rounding, packed, numbers)
    assert n_bytes == sum(file.stat().st_size for file in packed.glob("*.safetensors"))
    return packed, numbers, rounding


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("name", [*NAMES, "nvfp4"])
def test_numbers_are_those_that_transformers_decodes(name, tmp_path):
    source = Checkpoint.open(save_model(tmp_path / "base", shard_size="60KB"))
    packed, numbers, _ = rounded(source, tmp_path, name)
    loaded = AutoModelForCausalLM.from_pretrained(
        packed, dtype="auto", quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    own, base = weights_of(numbers), weights_of(source.folder)
    assert Checkpoint.open(numbers).tensors == source.tensors
    for tensor, decoded in loaded.state_dict().items():
        assert torch.equal(own[tensor], decoded), tensor
        is_rounded = "_proj" in tensor
        assert torch.equal(own[tensor], base[tensor]) != is_rounded, tensor


@pytest.mark.parametrize("name", NAMES)
def test_every_number_is_the_nearest_of_its_scale(name, tmp_path):
    source = Checkpoint.open(save_model(tmp_path / "base"))
    packed, numbers, rounding = rounded(source, tmp_path, name)
    own, base, stored = map(weights_of, (numbers, source.folder, packed))
    for tensor in (name for name in base if "_proj" in name):
        scale = stored[f"{tensor}_scale"].float()
        before, after = base[tensor].float(), own[tensor].float()
        width = before.shape[1] // scale.shape[1]
        scale = scale.repeat_interleave(width, dim=1)
        step = scale if name != "fp8" else before.abs() / 8 + scale * 2**-9
        # the scale and the decoded number are rounded to bfloat16; int4 ends at 7 of 7.5
        assert ((after - before).abs() <= 0.55 * step + before.abs() * 2**-8 + 1e-6).all()
        assert ((after - before).abs() > step / 8).any()
    assert (
        rounding.label
        == {
            "fp8": "FP8 (E4M3), a scale a row",
            "int8": "int8, a scale for 64 columns",
            "int4": "int4, a scale for 64 columns",
        }[name]
    )


def test_a_model_that_no_group_divides_is_refused(tiny_folder):
    source = Checkpoint.open(tiny_folder("llama"))
    with pytest.raises(QuantizationError, match=r"matrices of .* have 32, 48"):
        rounding_of(source, *formats_named(["int4"]))
    assert rounding_of(source, *formats_named(["fp8"])).layout == "float-quantized"


def test_a_model_that_is_quantised_already_is_refused(tmp_path):
    source = Checkpoint.open(save_quantised("fp8_block", tmp_path / "base"))
    with pytest.raises(QuantizationError, match="stored quantised already"):
        require_plain(source)


def test_vllm_is_told_which_modules_are_plain(tmp_path):
    source = Checkpoint.open(save_model(tmp_path / "base"))
    packed, _, _ = rounded(source, tmp_path, "int4")
    settings = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert settings["ignore"] == ["lm_head", "model.embed_tokens"]
    assert settings["config_groups"]["group_0"]["weights"]["group_size"] == 64


def removed(folder, out, basis):
    """The model in `folder` with Q taken out of what attention writes."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for layer in model.model.layers:
        weight = layer.self_attn.o_proj.weight
        weight.data -= basis @ (basis.T @ weight.data)
    model.bfloat16().save_pretrained(out)
    return out


def test_strengths_and_leak_say_what_a_format_leaves(tmp_path):
    assert LlamaConfig(**CONFIG).hidden_size == 64
    base = save_model(tmp_path / "base")
    basis = torch.linalg.qr(torch.randn(64, 1))[0]
    built = removed(base, tmp_path / "edited", basis)
    found = {}
    for name in NAMES:
        _, numbers, _ = rounded(Checkpoint.open(built), tmp_path / name, name)
        (found[name],) = surviving_strengths(base, built, numbers, basis)
    for part in found.values():
        assert (part.component, part.blocks) == ("attention", 2)
        assert part.low <= part.median <= part.high
        assert part.built == pytest.approx(1, abs=1e-2)
        assert 2 * part.leak_built < part.leak
    assert found["int8"].leak < found["fp8"].leak < found["int4"].leak
