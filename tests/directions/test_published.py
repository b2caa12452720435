"""Directions as a file: at run time, what the baked weights compute; and what it cannot hold."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from abliterator.anatomy import anatomy_of
from abliterator.bake import bake, plan_edits, runtime_obstacle, runtime_sites
from abliterator.checkpoint import Checkpoint
from abliterator.directions import (
    load_directions,
    load_subspace,
    save_control_vector,
    save_published,
)
from abliterator.engines import Steering, TransformersEngine
from abliterator.errors import DirectionError, UnsupportedModel
from abliterator.model import LoadedModel
from abliterator.recipe import Edit
from abliterator.subspace import orthonormal_columns
from tests.helpers.architectures import D_MODEL, VOCABULARY, save

ROOT = Path(__file__).parents[2]
# plain; biased; Conv1D; experts; norms behind the writers; state space and attention; parallel;
# several streams
NAMES = (
    *("llama", "qwen2", "gpt2", "mixtral", "gemma2", "olmo2", "mamba", "cohere", "granite"),
    *("gpt_oss", "deepseek_v4", "qwen4_exp_text"),
)


def vanilla(folder, dtype=torch.float32):
    assert AutoConfig.from_pretrained(folder).model_type
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def tokens():
    return torch.randint(4, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(5))


def columns(*shape):
    generator = torch.Generator().manual_seed(3)
    return orthonormal_columns(torch.randn(*shape, generator=generator).double())


def planned(folder, **settings):
    checkpoint = Checkpoint.open(folder)
    anatomy = anatomy_of(checkpoint.config)
    return checkpoint, anatomy, plan_edits(checkpoint, anatomy, Edit(**settings))


def publish(folder, file, basis, **settings):
    """The file of an edit, and the plan of it."""
    checkpoint, anatomy, plan = planned(folder, **settings)
    sites, tensors = runtime_sites(plan, checkpoint, basis)
    directions = torch.randn(anatomy.n_layers, D_MODEL, generator=torch.Generator().manual_seed(9))
    save_published(
        file,
        tensors={"subspace": basis, "directions": directions, **tensors},
        sites=sites,
        metadata={
            "layers": "[2, 1]",
            "blocks": anatomy.blocks,
            "model_type": anatomy.model_type,
        },
        obstacle=runtime_obstacle(plan),
    )
    return checkpoint, plan


def outputs(model):
    """Logits and every hidden state."""
    with torch.inference_mode():
        given = model(tokens(), use_cache=False, output_hidden_states=True)
    return [given.logits, *given.hidden_states]


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


EDITS = {
    "one subspace": (False, {}),
    "one a block, strengths by block": (
        True,
        {"strength": {"attention": {"0": 0.4, "1": 1.3}, "mlp": {"0": 1.0, "1": 0.7}}},
    ),
}


@pytest.fixture(scope="module", params=NAMES)
def folder(request, tmp_path_factory):
    return save(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("kind", EDITS)
def test_at_run_time_it_is_the_bake(kind, folder, tmp_path):
    by_block, settings = EDITS[kind]
    n_layers = planned(folder)[1].n_layers
    basis = columns(n_layers, D_MODEL, 2) if by_block else columns(D_MODEL, 3)
    file = tmp_path / "directions.safetensors"
    checkpoint, plan = publish(folder, file, basis, **settings)
    bake(checkpoint, plan, basis, tmp_path / "out")
    model, baked = vanilla(folder), outputs(vanilla(tmp_path / "out"))
    base = outputs(model)
    shared = load_directions(file)
    with shared.ablated(model):
        assert_same(outputs(model), baked)
    with shared.ablated(model, scale=0):
        assert all(map(torch.equal, outputs(model), base))
    with shared.ablated(model, scale=0.5):
        assert (outputs(model)[0] - baked[0]).abs().max() > 1e-3
    assert all(map(torch.equal, outputs(model), base))  # the hooks are gone
    assert (base[0] - baked[0]).abs().max() > 1e-2


def test_ten_lines_read_it(folder, tmp_path):
    """The lines of docs/directions.md, without this package."""
    text = (ROOT / "docs" / "directions.md").read_text("utf-8")
    (lines,) = re.findall(r"<!-- these lines are run by .*? -->\n```python\n(.*?)```", text, re.S)
    assert "abliterator" not in lines
    basis, file = columns(D_MODEL, 3), tmp_path / "directions.safetensors"
    checkpoint, plan = publish(folder, file, basis)
    bake(checkpoint, plan, basis, tmp_path / "out")
    model = vanilla(folder)
    exec(lines, {"path": str(file), "model": model})
    assert_same(outputs(model), outputs(vanilla(tmp_path / "out")))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("by_block", [False, True])
def test_subspaces_are_read_from_it_as_they_were_baked(by_block, llama, tmp_path):
    basis, file = columns(*([3] * by_block), D_MODEL, 3), tmp_path / "d.safetensors"
    publish(llama, file, basis)
    found = load_subspace(file)
    torch.testing.assert_close(found.basis, basis, rtol=0, atol=1e-14)
    assert found.layers == load_directions(file).layers == (2, 1)


def test_the_same_build_gives_the_same_bytes(llama, tmp_path):
    """safetensors itself orders metadata by chance, from process to process."""
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        publish(llama, file, columns(D_MODEL, 3))
    assert files[0].read_bytes() == files[1].read_bytes()
    data = files[0].read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert list(header["__metadata__"]) == sorted(header["__metadata__"])
    assert int.from_bytes(data[:8], "little") % 8 == 0


def test_biases_that_are_kept(tmp_path):
    base = save("gpt2", tmp_path / "base")
    basis, file = columns(D_MODEL, 3), tmp_path / "d.safetensors"
    checkpoint, plan = publish(base, file, basis, biases=False)
    bake(checkpoint, plan, basis, tmp_path / "out")
    shared, model = load_directions(file), vanilla(base)
    assert all(site.keeps_bias for site in shared.sites)
    with shared.ablated(model):
        assert_same(outputs(model), outputs(vanilla(tmp_path / "out")))


def test_in_bfloat16_it_is_rounded_once(llama, tmp_path):
    basis, file = columns(D_MODEL, 3), tmp_path / "d.safetensors"
    publish(llama, file, basis)
    model = vanilla(llama, torch.bfloat16)
    shared = load_directions(file)
    (site, *_) = shared.sites
    with shared.ablated(model):
        module = model.get_submodule(site.module)
        given = torch.randn(5, module.in_features, dtype=torch.bfloat16)
        written = module(given)
    plain = module(given).float()
    exact = plain - site.strength * (plain @ basis.float()) @ basis.float().T
    assert torch.equal(written, exact.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("llama", {"norm": "column"}, "`edit.norm: column` rescales"),
        ("mixtral", {"experts": (0,)}, "some experts"),
        ("gpt_oss", {"biases": False}, "biases of experts"),
    ],
)
def test_edits_that_have_no_run_time_form(name, settings, says, tmp_path):
    base, file = save(name, tmp_path / "base"), tmp_path / "d.safetensors"
    publish(base, file, columns(D_MODEL, 3), **settings)
    model, shared = vanilla(base), load_directions(file)
    with pytest.raises(DirectionError, match=f"no run-time form: .*{says}"), shared.ablated(model):
        pass
    with shared.added(model, layer=1, scale=0.0):  # to steer with it is another thing
        outputs(model)


def test_a_model_of_another_shape(llama, tmp_path):
    file = tmp_path / "d.safetensors"
    publish(llama, file, columns(D_MODEL, 3))
    other = vanilla(save("gpt2", tmp_path / "gpt2"))
    with pytest.raises(UnsupportedModel), load_directions(file).ablated(other):
        pass


@pytest.mark.parametrize("layer", [1, 2])
def test_steering_is_what_an_engine_does(layer, llama, tmp_path):
    file = tmp_path / "d.safetensors"
    publish(llama, file, columns(D_MODEL, 3))
    shared, model = load_directions(file), vanilla(llama)
    base = outputs(model)
    direction = load_file(file)["directions"][layer - 1]
    engine = TransformersEngine(LoadedModel(model, None, llama, "cpu"))
    with shared.added(model, layer=layer, scale=-0.5):
        ours = outputs(model)
    with engine.edited(Steering(layer, -0.5 * direction)):
        assert all(map(torch.equal, ours, outputs(model)))
    entered = []
    keep = model.model.layers[layer].register_forward_pre_hook(lambda m, x: entered.append(x[0]))
    outputs(model)
    with shared.added(model, layer=layer, scale=-0.5):
        outputs(model)
    keep.remove()
    before, after = entered  # residual l is what block l reads
    torch.testing.assert_close(after - before, (-0.5 * direction).expand_as(before))
    assert not torch.equal(ours[0], base[0])
    for wrong in (0, 4):
        with pytest.raises(DirectionError, match="layers 1 to 3, and none of"):
            shared.direction(wrong)


@pytest.mark.parametrize("name", ["deepseek_v4", "qwen4_exp_text"])
def test_steering_adds_to_every_stream(name, tmp_path):
    folder, file = save(name, tmp_path / "base"), tmp_path / "d.safetensors"
    publish(folder, file, columns(D_MODEL, 3))
    shared, model = load_directions(file), vanilla(folder)
    base = outputs(model)
    engine = TransformersEngine(LoadedModel(model, None, folder, "cpu"))
    with shared.added(model, layer=2, scale=-0.5):
        ours = outputs(model)
    with engine.edited(Steering(2, -0.5 * shared.direction(2))):
        assert all(map(torch.equal, ours, outputs(model)))
    assert (ours[0] - base[0]).abs().max() > 0.01


# Control vectors


def test_a_control_vector_is_what_llama_cpp_reads(llama, tmp_path):
    gguf = pytest.importorskip("gguf")
    file, vector = tmp_path / "d.safetensors", tmp_path / "v.gguf"
    publish(llama, file, columns(D_MODEL, 3))
    shared = load_directions(file)
    save_control_vector(vector, shared, layers=[2], scale=-0.5)
    reader = gguf.GGUFReader(vector)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "llama"
    assert fields["controlvector.layer_count"] == 1
    (tensor,) = reader.tensors
    # llama.cpp adds direction.N to the output of block N, from 0: residual layer 2
    assert (tensor.name, tensor.tensor_type.name) == ("direction.1", "F32")
    expected = -0.5 * load_file(file)["directions"][1]
    assert torch.equal(torch.tensor(tensor.data.copy()), expected)


@pytest.mark.parametrize(
    ("layers", "says"), [([1], "no layer 1"), ([], "no layer 1"), ([4], "none of 4")]
)
def test_layers_that_no_control_vector_reaches(layers, says, llama, tmp_path):
    file = tmp_path / "d.safetensors"
    publish(llama, file, columns(D_MODEL, 3))
    with pytest.raises(DirectionError, match=says):
        save_control_vector(tmp_path / "v.gguf", load_directions(file), layers=layers, scale=1.0)
    assert not (tmp_path / "v.gguf").exists()


def test_several_streams_have_no_control_vector(llama, tmp_path):
    file = tmp_path / "d.safetensors"
    publish(llama, file, columns(D_MODEL, 3))
    shared = load_directions(file)
    shared = replace(shared, metadata={**shared.metadata, "streams": "several"})
    with pytest.raises(DirectionError, match="added to one residual stream"):
        save_control_vector(tmp_path / "v.gguf", shared, layers=[2], scale=1.0)


# Files that are none


def test_files_of_another_kind(llama, tmp_path):
    file = tmp_path / "d.safetensors"
    with pytest.raises(DirectionError, match="Cannot read directions"):
        load_directions(tmp_path / "nothing.safetensors")
    with pytest.raises(DirectionError, match="Cannot read directions"):
        load_directions(tmp_path)
    save_file({"subspace": torch.eye(3)}, file)
    with pytest.raises(DirectionError, match="states the format and version"):
        load_directions(file)
    file.write_bytes(b"no tensors")
    with pytest.raises(DirectionError, match="Cannot read directions"):
        load_directions(file)


@pytest.mark.parametrize(
    "broken",
    [
        {"sites": "{"},
        {"sites": '[{"module": "x"}]'},
        {"sites": "7"},
        {"layers": "["},
        {
            "sites": json.dumps(
                [
                    {
                        "module": "m",
                        "block": 0,
                        "component": "mlp",
                        "strength": 1.0,
                        "read": "directions",
                    }
                ]
            )
        },
        {"sites": json.dumps([{"module": "m", "block": 9, "component": "mlp", "strength": 1.0}])},
        {
            "sites": json.dumps(
                [{"module": "m", "block": 0, "component": "mlp", "strength": 1.0, "take": "gone"}]
            )
        },
    ],
)
def test_damaged_metadata(broken, tmp_path):
    file = tmp_path / "d.safetensors"
    metadata = {"format": "abliterator directions", "version": "1", "layers": "[1]", "sites": "[]"}
    tensors = {"subspace": torch.zeros(2, 8, 1), "directions": torch.zeros(2, 7)}
    if "9" in str(broken):
        tensors["directions"] = torch.zeros(2, 8)
    save_file(tensors, file, metadata=metadata | broken)
    with pytest.raises(DirectionError, match="is damaged"):
        load_directions(file)
