"""Formats in which no edit can be kept: a named error that says which base to use, before anything.

Configs and names of tensors are those of published checkpoints, as their tools write them.
"""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from abliterator.cli import main
from abliterator.errors import CheckpointError, UnsupportedModel
from abliterator.formats import storage_of
from abliterator.formats._storage import SCHEMES
from abliterator.pipeline import plan_model

WRITER = "model.layers.0.mlp.down_proj"
INT = torch.zeros(4, 4, dtype=torch.int32)
BYTES = torch.zeros(16, 1, dtype=torch.uint8)
HALF = torch.zeros(4, 4, dtype=torch.float16)
FP8 = torch.zeros(4, 4).to(torch.float8_e4m3fn)


def group(**weights):
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


REFUSED = {
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"},
        {"qweight": INT, "qzeros": INT, "scales": HALF, "g_idx": INT[0]},
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"},
        {"qweight": INT, "qzeros": INT, "scales": HALF},
    ),
    "auto-round": (
        {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq"},
        {"qweight": INT, "qzeros": INT, "scales": HALF},
    ),
    "bitsandbytes nf4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {
            "weight": BYTES,
            "weight.absmax": BYTES[:, 0],
            "weight.quant_map": torch.zeros(16),
            "weight.nested_absmax": torch.zeros(4),
            "weight.nested_quant_map": torch.zeros(256),
            "weight.quant_state.bitsandbytes__nf4": BYTES[:, 0],
        },
    ),
    "bitsandbytes int8": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"weight": INT.to(torch.int8), "SCB": torch.zeros(4), "weight_format": BYTES[0, 0]},
    ),
    "compressed-tensors int3": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            **group(num_bits=3, type="int", strategy="group", group_size=128),
        },
        {"weight_packed": INT, "weight_scale": HALF, "weight_shape": INT[0, :2].long()},
    ),
    "compressed-tensors sparse": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            **group(num_bits=4, type="int", strategy="group", group_size=128),
            "sparsity_config": {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"},
        },
        {"weight_packed": INT, "weight_scale": HALF, "weight_shape": INT[0, :2].long()},
    ),
    "compressed-tensors mxfp4": (
        {
            "quant_method": "compressed-tensors",
            "format": "mxfp4-pack-quantized",
            **group(num_bits=4, type="float", strategy="group", group_size=32),
        },
        {"weight_packed": BYTES, "weight_scale": BYTES},
    ),
    "modelopt": (
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"},
        {"weight": BYTES, "weight_scale": FP8, "weight_scale_2": torch.zeros(())},
    ),
    "fbgemm_fp8": (
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
        {"weight": FP8, "weight_scale": torch.zeros(4, 1)},
    ),
    "hqq": ({"quant_method": "hqq"}, {"weight": BYTES}),
}
# These are known by their tensors even where config.json says nothing, as older tools left it.
BY_NAME = ("gptq", "awq", "bitsandbytes nf4", "bitsandbytes int8", "modelopt")


def checkpoint(folder, name, *, told=True, card=""):
    settings, tensors = REFUSED[name]
    save_file(
        {f"{WRITER}.{ending}": t.clone() for ending, t in tensors.items()},
        folder / "model.safetensors",
    )
    config = {"model_type": "llama", "hidden_size": 4, "num_hidden_layers": 1}
    config |= {"quantization_config": settings} if told else {}
    (folder / "config.json").write_text(json.dumps(config))
    if card:
        (folder / "README.md").write_text(f"---\nbase_model: {card}\n---\n")
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_the_error_names_the_format_and_what_to_use(name, tmp_path):
    folder = checkpoint(tmp_path, name)
    with pytest.raises(UnsupportedModel, match=f"quantised by {name.split()[0]}") as caught:
        plan_model(str(folder), tmp_path / "out")
    assert "bfloat16, or a checkpoint of it in FP8" in str(caught.value)


@pytest.mark.parametrize("name", BY_NAME)
def test_tensors_tell_what_the_config_does_not(name, tmp_path):
    with pytest.raises(UnsupportedModel, match=f"quantised by {name.split()[0]}"):
        plan_model(str(checkpoint(tmp_path, name, told=False)), tmp_path / "out")


@pytest.mark.parametrize("card", ["toys/base-1B", "[toys/base-1B]"])
@pytest.mark.parametrize("told", [True, False])
def test_the_base_that_the_card_names_is_named(card, told, tmp_path):
    folder = checkpoint(tmp_path, "gptq", told=told, card=card)
    with pytest.raises(UnsupportedModel, match="made from, toys/base-1B"):
        plan_model(str(folder), tmp_path / "out")


def test_the_command_says_it_in_one_paragraph_and_writes_nothing(tmp_path):
    folder = checkpoint(tmp_path, "awq")
    before = sorted(path.name for path in folder.iterdir())
    result = CliRunner().invoke(main, ["plan", str(folder)])
    assert result.exit_code == 1
    assert "quantised by awq (bits 4)" in result.output
    assert "Traceback" not in result.output
    assert sorted(path.name for path in folder.iterdir()) == before


def test_gguf_is_told_by_its_file(tmp_path):
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="Use the model it was made from"):
        plan_model(str(tmp_path), tmp_path / "out")


@pytest.mark.parametrize("method", SCHEMES)
def test_what_is_not_refused(method):
    settings = {"quant_method": method}
    if method == "compressed-tensors":
        settings |= {"format": "float-quantized", **group(num_bits=8, type="float")}
    if method.startswith("modelopt"):
        settings |= {"quant_algo": "NVFP4"}
    assert storage_of({"quantization_config": settings}).scheme is SCHEMES[method]
