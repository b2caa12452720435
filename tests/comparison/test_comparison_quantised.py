"""Weight diffs where one side, or both, are FP8 or MXFP4: figures of the numbers that are meant."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from abliterator import pipeline
from abliterator.checkpoint import Checkpoint
from abliterator.comparison import diff_weights
from abliterator.recipe import Edit
from tests.helpers.quantised import BLOCK, D_MODEL, FORMATS, expanded, save_quantised

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """`base(name)`: the folder of a quantised model; made once, not to be written to."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("quantised") / "base"
            made[name] = save_quantised(name, folder)
        return made[name]

    return make


def diff(base: Path, edited: Path):
    return diff_weights(Checkpoint.open(base), Checkpoint.open(edited))


def baked(base: Path, where: Path, k: int, **edit) -> Path:
    generator = torch.Generator().manual_seed(k)
    save_file({"subspace": torch.randn(D_MODEL, k, generator=generator)}, where / "q.safetensors")
    pipeline.bake_subspace(str(base), where / "q.safetensors", where / "out", edit=Edit(**edit))
    return where / "out"


def changed(base: Path, where: Path, change, *, config=lambda told: told) -> Path:
    shutil.copytree(base, where)
    tensors = load_file(where / "model.safetensors")
    change(tensors)
    save_file(tensors, where / "model.safetensors", metadata={"format": "pt"})
    told = config(json.loads((where / "config.json").read_text()))
    (where / "config.json").write_text(json.dumps(told))
    return where


def decoded(tensors, name):
    """Independent of the room `formats`: numbers times the scale of their block."""
    numbers, scale = tensors[name].float(), tensors[name + "_scale_inv"].float()
    return numbers * expanded(scale, numbers.shape, (BLOCK, BLOCK))


@pytest.mark.parametrize("way", ["keep", "dequantize"])
@pytest.mark.parametrize("name", [*FORMATS, "fp8_block experts"])
@pytest.mark.parametrize("k", [1, 3])
def test_our_edit_is_directional_whether_it_stays_quantised_or_not(name, k, way, base, tmp_path):
    out = baked(base(name), tmp_path, k, quantized=way)
    found = diff(base(name), out)
    ours = json.loads((out / "abliterator" / "edits.json").read_text())
    told = {delta.name: delta for delta in found.deltas if delta.rank != 0}
    assert (found.verdict, found.rank) == ("directional", k)
    assert told.keys() == {edit["name"] for edit in ours}
    assert {(delta.rank, delta.side) for delta in told.values()} == {(k, "output")}
    assert all(delta.strength == pytest.approx(1, abs=0.05) for delta in told.values())
    assert all(0.01 < delta.relative < 0.5 for delta in told.values())
    assert (found.only_base, found.only_edited) == ((), ())


@pytest.mark.parametrize("way", ["keep", "dequantize"])
@pytest.mark.parametrize("name", ["int8_row", "int4_zeros", "nvfp4", "modelopt", "gptq", "awq"])
def test_packed_weights_have_figures_under_their_plain_name(name, way, base, tmp_path):
    found = diff(base(name), baked(base(name), tmp_path, 1, quantized=way))
    writers = {
        f"model.layers.{layer}.{part}.weight"
        for layer in (0, 1)
        for part in ("self_attn.o_proj", "mlp.down_proj")
    }
    assert {delta.name for delta in found.deltas} == writers
    assert all(0.01 < delta.relative < 0.5 for delta in found.deltas)
    assert {delta.shape for delta in found.deltas} == {(D_MODEL, D_MODEL), (D_MODEL, 384)}
    assert (found.only_base, found.only_edited) == ((), ())
    assert diff(base(name), base(name)).verdict == "identical"
    if way == "dequantize":
        told = [(delta.rank, delta.side, round(delta.strength)) for delta in found.deltas]
        assert told == [(1, "output", 1)] * 4


@pytest.mark.parametrize("way", ["keep", "dequantize"])
def test_mxfp4_experts_have_figures_under_their_plain_name(way, base, tmp_path):
    found = diff(base("mxfp4"), baked(base("mxfp4"), tmp_path, 1, quantized=way))
    told = {delta.name: delta for delta in found.deltas}
    experts = [told[f"model.layers.{layer}.mlp.experts.down_proj"] for layer in (0, 1)]
    assert all(delta.shape == (4, D_MODEL, D_MODEL) for delta in experts)
    assert all(0.01 < delta.relative < 0.5 for delta in experts)
    assert (found.only_base, found.only_edited) == ((), ())
    gates = [name for name in told if name.endswith("gate_up_proj")]
    assert gates == [] if way == "keep" else all(told[name].relative < 0.01 for name in gates)


def test_figures_are_those_of_the_decoded_numbers(base, tmp_path):
    folder = base("fp8_block")

    def one_number(tensors):
        numbers = tensors[NAME].float()
        numbers[5, 7] = 448.0
        tensors[NAME] = numbers.to(torch.float8_e4m3fn)

    found = diff(folder, changed(folder, tmp_path / "m", one_number))
    (delta,) = found.deltas
    before = decoded(load_file(folder / "model.safetensors"), NAME)
    after = decoded(load_file(tmp_path / "m" / "model.safetensors"), NAME)
    assert (delta.name, delta.rank) == (NAME, 1)
    assert delta.norm == pytest.approx(float((after - before).norm()), rel=1e-5)
    assert delta.relative == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-5)


def test_a_scale_counts_as_part_of_its_weight(base, tmp_path):
    def double(tensors):
        tensors[NAME + "_scale_inv"] *= 2

    found = diff(base("fp8_block"), changed(base("fp8_block"), tmp_path / "m", double))
    assert [delta.name for delta in found.deltas] == [NAME]
    assert found.deltas[0].relative == pytest.approx(1)
    tensors = load_file(base("fp8_block") / "model.safetensors")
    assert found.compared == sum(not name.endswith("_scale_inv") for name in tensors)


@pytest.mark.parametrize("turned", [False, True])
def test_quantising_alone_is_rounding_and_no_edit(turned, base, tmp_path):
    generator = torch.Generator().manual_seed(2)

    def plain(tensors):
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            weight = name.removesuffix("_scale_inv")
            numbers = decoded(tensors, weight)
            step = 0.03 * numbers.abs()  # the nearest FP8 number is at most 1/16 away
            noise = (torch.rand(numbers.shape, generator=generator) * 2 - 1) * step
            tensors[weight] = (numbers + noise).bfloat16()
            del tensors[name]

    def unquantised(told):
        return {key: value for key, value in told.items() if key != "quantization_config"}

    other = changed(base("fp8_block"), tmp_path / "m", plain, config=unquantised)
    found = diff(other, base("fp8_block")) if turned else diff(base("fp8_block"), other)
    assert found.verdict == "rounding"
    assert found.deltas
    assert all(0.001 < delta.relative < 0.05 for delta in found.deltas)


def test_what_cannot_be_decoded_has_no_figures(base, tmp_path):
    """FP8 numbers of which config.json does not say what their scales are."""

    def one_number(tensors):
        tensors[NAME] = tensors[NAME].float().neg().to(torch.float8_e4m3fn)

    def unknown(told):
        return {**told, "quantization_config": {"quant_method": "gptq", "bits": 4}}

    first = changed(base("fp8_block"), tmp_path / "a", lambda tensors: None, config=unknown)
    second = changed(base("fp8_block"), tmp_path / "b", one_number, config=unknown)
    found = diff(first, second)
    assert [(delta.name, delta.norm, delta.rank) for delta in found.deltas] == [(NAME, None, None)]
    assert found.verdict == "other"
