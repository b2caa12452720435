"""The table against real modules: every writer found, on the right side, none passed over."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, Gemma2Config, Olmo2Config

from abliterator.anatomy import anatomy_of, known_model_types
from abliterator.errors import CheckpointError, UnsupportedModel
from abliterator.model import hooked
from tests.helpers.leak import leak_meter
from tests.helpers.tiny import (
    _SIZES,
    D_MODEL,
    FAMILIES,
    N_LAYERS,
    VOCABULARY,
    model_type,
    randomise,
)

# Post-norm families, built to show what the plain formula would leave behind.
POST_NORM = {"gemma2": Gemma2Config, "olmo2": Olmo2Config}


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def read_shapes(folder):
    shapes = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            shapes |= {n: tuple(tensors.get_slice(n).get_shape()) for n in tensors.keys()}  # noqa: SIM118
    return shapes


def random_basis(k=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(D_MODEL, k, generator=generator)).Q


def edit(parameter, basis, axis):
    """W' = W - Q Qᵀ W along `axis`, written out with no code of ours."""
    moved = parameter.data.movedim(axis, 0)
    moved -= torch.tensordot(basis @ basis.T, moved, dims=1)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def anatomy(family, tiny_folder):
    return anatomy_of(read_config(tiny_folder(family)))


@pytest.fixture
def writers(family, anatomy, tiny_folder):
    return anatomy.writers(read_shapes(tiny_folder(family)))


@pytest.fixture
def fresh_model(family, tiny_folder):
    """A model whose weights the test may change."""
    remote = {"trust_remote_code": True} if family == "qwen" else {}
    return AutoModelForCausalLM.from_pretrained(tiny_folder(family), **remote).eval()


@pytest.fixture
def token_ids():
    return torch.randint(4, VOCABULARY, (2, 11))


def test_the_families_tested_here_are_in_the_table():
    """All others are in tests/anatomy/test_architectures.py."""
    assert {model_type(family) for family in FAMILIES} < set(known_model_types())


def test_anatomy_reads_the_config(anatomy, fresh_model):
    assert (anatomy.n_layers, anatomy.d_model) == (N_LAYERS, D_MODEL)
    assert len(fresh_model.get_submodule(anatomy.blocks)) == N_LAYERS
    heads = (fresh_model.get_output_embeddings().weight, fresh_model.get_input_embeddings().weight)
    assert anatomy.tied_embeddings == (heads[0] is heads[1])


def test_editing_every_writer_leaves_no_block_writing_the_subspace(writers, fresh_model, token_ids):
    basis = random_basis()
    assert min(leak_meter(fresh_model, basis, token_ids)) > 0.05
    parameters = dict(fresh_model.named_parameters())
    for writer in writers:
        if writer.component != "embedding":
            edit(parameters[writer.name], basis, writer.axis)
    assert max(leak_meter(fresh_model, basis, token_ids)) < 1e-6


def test_hooks_on_writer_modules_do_the_same(writers, fresh_model, token_ids):
    basis = random_basis()
    modules = {writer.module for writer in writers if writer.component != "embedding"}
    hooks = dict.fromkeys(modules, lambda hidden: hidden - hidden @ basis @ basis.T)
    with hooked(fresh_model, hooks):
        assert max(leak_meter(fresh_model, basis, token_ids)) < 1e-6


def test_each_writer_alone_left_out_shows(writers, fresh_model, token_ids):
    basis = random_basis()
    parameters = dict(fresh_model.named_parameters())
    originals = {w.name: parameters[w.name].detach().clone() for w in writers}
    for writer in writers:
        if writer.component != "embedding":
            edit(parameters[writer.name], basis, writer.axis)
    for writer in writers:
        if writer.component == "embedding":
            continue
        edited = parameters[writer.name].detach().clone()
        parameters[writer.name].data.copy_(originals[writer.name])
        assert leak_meter(fresh_model, basis, token_ids)[writer.layer] > 0.01, writer.name
        parameters[writer.name].data.copy_(edited)


def test_the_other_side_of_a_square_matrix_would_leak(tiny_folder, token_ids):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("llama")).eval()
    basis = random_basis()
    for block in model.model.layers:
        edit(block.self_attn.o_proj.weight, basis, 1)
        edit(block.mlp.down_proj.weight, basis, 0)
    assert min(leak_meter(model, basis, token_ids)) > 0.05


def test_editing_the_embedding_clears_the_start_of_the_stream(writers, fresh_model, token_ids):
    basis = random_basis()
    embedding = next(writer for writer in writers if writer.component == "embedding")
    edit(dict(fresh_model.named_parameters())[embedding.name], basis, embedding.axis)
    start = fresh_model.get_submodule(embedding.module)(token_ids)
    assert (start @ basis).norm() < 1e-5 * start.norm()


def test_writers_come_in_order_with_their_places(tiny_folder):
    folder = tiny_folder("llama_biased")
    writers = anatomy_of(read_config(folder)).writers(read_shapes(folder))
    assert [(w.component, w.layer, w.axis, w.kind) for w in writers[:5]] == [
        ("embedding", -1, 1, "weight"),
        ("attention", 0, 0, "weight"),
        ("attention", 0, 0, "bias"),
        ("mlp", 0, 0, "weight"),
        ("mlp", 0, 0, "bias"),
    ]
    assert writers[1].module == "model.layers.0.self_attn.o_proj"
    assert len(writers) == 1 + 4 * N_LAYERS


def test_shards_give_the_same_writers(tiny_folder):
    single, sharded = tiny_folder("llama"), tiny_folder("llama", shard_size="30KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    anatomy = anatomy_of(read_config(single))
    assert anatomy.writers(read_shapes(single)) == anatomy.writers(read_shapes(sharded))


@given(st.text("abcmodellayers.0123_weight", min_size=1, max_size=40))
def test_a_name_that_is_not_claimed_stops_the_plan(name):
    config = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 4}
    shapes = {
        "model.embed_tokens.weight": (9, 4),
        "model.layers.0.self_attn.o_proj.weight": (4, 4),
        "model.layers.0.mlp.down_proj.weight": (4, 8),
    }
    known = {*shapes, "model.norm.weight", "lm_head.weight"}
    if name not in known:
        with pytest.raises(UnsupportedModel) as raised:
            anatomy_of(config).writers({**shapes, name: (4, 4)})
        assert name in str(raised.value)


@pytest.mark.parametrize(
    "stranger",
    [
        "model.layers.0.mlp.experts.0.down_proj.weight",
        "model.layers.0.self_attn.o_proj.weight_scale_inv",
        "model.layers.00.self_attn.o_proj.weight",
        "language_model.model.layers.0.mlp.down_proj.weight",
        "model.layers.0.self_attn.q_norm.weight",
    ],
)
def test_variants_of_known_tensors_are_strangers(stranger, tiny_folder):
    folder = tiny_folder("llama")
    with pytest.raises(UnsupportedModel, match=stranger.replace(".", r"\.")):
        anatomy_of(read_config(folder)).writers({**read_shapes(folder), stranger: (32, 32)})


@pytest.mark.parametrize("part", ["self_attn.o_proj.weight", "self_attn.q_proj.weight"])
def test_a_layer_that_the_config_does_not_have(part, tiny_folder):
    folder = tiny_folder("llama")
    name = f"model.layers.{N_LAYERS}.{part}"
    with pytest.raises(UnsupportedModel, match=f"{name}.*there are {N_LAYERS} blocks"):
        anatomy_of(read_config(folder)).writers({**read_shapes(folder), name: (32, 32)})


@pytest.mark.parametrize("ending", ["weight", "bias"])
def test_a_missing_writer_is_named(ending, tiny_folder):
    folder = tiny_folder("llama_biased")
    name = f"model.layers.1.mlp.down_proj.{ending}"
    shapes = {n: shape for n, shape in read_shapes(folder).items() if n != name}
    with pytest.raises(UnsupportedModel, match=f"no tensor {name}"):
        anatomy_of(read_config(folder)).writers(shapes)


@pytest.mark.parametrize("shape", [(31, 32), (32,), (1, 32, 32), ()])
def test_a_writer_of_another_width_is_named(shape, tiny_folder):
    folder = tiny_folder("llama")
    name = "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(UnsupportedModel, match=name):
        anatomy_of(read_config(folder)).writers({**read_shapes(folder), name: shape})


def test_an_unknown_type_is_named_with_the_known_ones():
    with pytest.raises(UnsupportedModel, match=r"'mamba9'.*among them mamba, mamba2"):
        anatomy_of({"model_type": "mamba9"})


def test_a_wrapper_of_several_models_is_refused():
    with pytest.raises(UnsupportedModel, match="text_config"):
        anatomy_of({"model_type": "llava9", "text_config": {"model_type": "llama"}})


@pytest.mark.parametrize("name", ["dory", "muse_spark", "openai-gpt", "rwkv"])
def test_known_types_without_a_proof_are_refused_with_the_reason(name):
    with pytest.raises(UnsupportedModel, match=f"'{name}' are not supported: (its|what) "):
        anatomy_of({"model_type": name, "num_hidden_layers": 2, "hidden_size": 8})


@pytest.mark.parametrize(
    ("name", "key", "other"),
    [("opt", "do_layer_norm_before", False), ("chameleon", "swin_norm", True)],
)
def test_a_variant_whose_stream_is_built_otherwise_is_refused(name, key, other):
    config = {"model_type": name, "num_hidden_layers": 2, "hidden_size": 8}
    assert anatomy_of(config).n_layers == 2
    assert anatomy_of({**config, key: not other}).n_layers == 2
    with pytest.raises(UnsupportedModel, match=f"{key}: {other}"):
        anatomy_of({**config, key: other})


def test_older_configs_call_their_sizes_otherwise():
    anatomy = anatomy_of({"model_type": "bloom", "n_layer": 2, "n_embed": 8})
    assert (anatomy.n_layers, anatomy.d_model) == (2, 8)
    with pytest.raises(CheckpointError, match="hidden_size: None"):
        anatomy_of({"model_type": "bloom", "n_layer": 2})


def test_a_wrapper_without_its_text_config_is_damaged():
    with pytest.raises(CheckpointError, match="no text_config"):
        anatomy_of({"model_type": "gemma3"})


def test_gains_are_named_as_they_are_on_disk():
    config = {"model_type": "gemma3_text", "num_hidden_layers": 1, "hidden_size": 8}
    wrapped = {"model_type": "gemma3", "text_config": config}
    shapes = {
        "embed_tokens.weight": (9, 8),
        "layers.0.self_attn.o_proj.weight": (8, 8),
        "layers.0.mlp.down_proj.weight": (8, 5),
        "layers.0.post_attention_layernorm.weight": (8,),
        "layers.0.post_feedforward_layernorm.weight": (8,),
    }
    prefix = "language_model.model."
    on_disk = {prefix + name: shape for name, shape in shapes.items()}
    anatomy = anatomy_of(wrapped)
    assert anatomy.blocks == "model.language_model.layers"
    writer = anatomy.writers(on_disk | {"vision_tower.patch.weight": (3, 3)})[1]
    assert writer.name == prefix + "layers.0.self_attn.o_proj.weight"
    assert writer.gains == (prefix + "layers.0.post_attention_layernorm.weight",)
    assert writer.gain_offset == 1.0
    assert writer.module == "model.language_model.layers.0.self_attn.o_proj"
    del on_disk[prefix + "layers.0.post_attention_layernorm.weight"]
    with pytest.raises(UnsupportedModel, match=r"no tensor .*post_attention_layernorm"):
        anatomy.writers(on_disk)


@pytest.mark.parametrize("name", POST_NORM)
def test_the_plain_formula_leaks_where_a_norm_follows(name, token_ids):
    model = AutoModelForCausalLM.from_config(POST_NORM[name](**_SIZES)).eval()
    randomise(model)
    basis = random_basis()
    for block in model.model.layers:
        edit(block.self_attn.o_proj.weight, basis, 0)
        edit(block.mlp.down_proj.weight, basis, 0)
    assert max(leak_meter(model, basis, token_ids)) > 0.01


@pytest.mark.parametrize("quantised", [{"quant_method": "hqq"}, {"bits": 4}])
def test_quantised_weights_are_refused(quantised):
    config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8}
    with pytest.raises(UnsupportedModel, match="quantised"):
        anatomy_of({**config, "quantization_config": quantised})


@pytest.mark.parametrize("value", [None, 0, -1, "32", 2.0, True])
@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size"])
def test_a_config_without_sizes_is_damaged(key, value):
    config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8, key: value}
    with pytest.raises(CheckpointError, match=key):
        anatomy_of(config)


def test_reading_the_table_loads_no_torch():
    script = (
        "import sys; from abliterator.anatomy import anatomy_of, known_model_types;"
        "known_model_types(); assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_an_older_config_says_what_the_text_half_is_outside():
    flat = {"model_type": "qwen2_vl", "num_hidden_layers": 2, "hidden_size": 8, "vision_config": {}}
    anatomy = anatomy_of(flat)
    assert (anatomy.n_layers, anatomy.d_model) == (2, 8)
    shapes = {
        "model.embed_tokens.weight": (9, 8),
        "visual.blocks.0.attn.proj.weight": (4, 4),
        "lm_head.weight": (9, 8),
    }
    for layer in range(2):
        shapes[f"model.layers.{layer}.self_attn.o_proj.weight"] = (8, 8)
        shapes[f"model.layers.{layer}.mlp.down_proj.weight"] = (8, 5)
    assert anatomy.writers(shapes)[1].module == "model.language_model.layers.0.self_attn.o_proj"
    assert anatomy.left_alone(shapes) == {"vision tower": 1}


def test_sizes_that_a_wrappers_text_config_leaves_out():
    anatomy = anatomy_of({"model_type": "llava", "text_config": {"model_type": "llama"}})
    assert (anatomy.n_layers, anatomy.d_model) == (32, 4096)
