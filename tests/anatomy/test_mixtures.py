"""Mixtures of experts: every expert is found, and what lies beside them."""

from __future__ import annotations

import pytest

from abliterator.anatomy import anatomy_of
from abliterator.errors import UnsupportedModel

MOE_CONFIG = {
    "model_type": "glm4_moe",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "n_routed_experts": 2,
    "num_nextn_predict_layers": 1,
}


def moe_shapes(blocks=2):
    """A dense block and then blocks of two experts with a shared one beside them."""
    shapes = {"model.embed_tokens.weight": (9, 8), "model.layers.0.mlp.down_proj.weight": (8, 5)}
    for layer in range(blocks):
        shapes[f"model.layers.{layer}.self_attn.o_proj.weight"] = (8, 8)
    for layer in range(1, blocks):
        for part in ("experts.0", "experts.1", "shared_experts"):
            shapes[f"model.layers.{layer}.mlp.{part}.down_proj.weight"] = (8, 8)
    return shapes


def test_experts_and_what_lies_beside_them():
    writers = anatomy_of(MOE_CONFIG).writers(moe_shapes())
    found = [(w.component, w.layer) for w in writers]
    assert found == [
        ("embedding", -1),
        ("attention", 0),
        ("mlp", 0),
        ("attention", 1),
        ("expert", 1),
        ("expert", 1),
        ("shared_expert", 1),
    ]
    assert {w.module for w in writers if w.component == "expert"} == {"model.layers.1.mlp.experts"}


@pytest.mark.parametrize("part", ["experts.0", "experts.1"])
def test_a_missing_expert_is_named(part):
    name = f"model.layers.1.mlp.{part}.down_proj.weight"
    shapes = {key: shape for key, shape in moe_shapes().items() if key != name}
    with pytest.raises(UnsupportedModel, match=f"no tensor {name}"):
        anatomy_of(MOE_CONFIG).writers(shapes)


def test_a_shared_expert_that_one_block_lacks_is_named():
    name = "model.layers.2.mlp.shared_experts.down_proj.weight"
    shapes = {key: shape for key, shape in moe_shapes(3).items() if key != name}
    config = {**MOE_CONFIG, "num_hidden_layers": 3, "num_nextn_predict_layers": 0}
    with pytest.raises(UnsupportedModel, match=f"no tensor {name}"):
        anatomy_of(config).writers(shapes)


@pytest.mark.parametrize("stranger", ["experts.2", "shared_experts"])
def test_an_expert_that_the_config_does_not_have(stranger):
    name = f"model.layers.0.mlp.{stranger}.down_proj.weight"
    with pytest.raises(UnsupportedModel, match=f"{name}.*no place"):
        anatomy_of(MOE_CONFIG).writers({**moe_shapes(), name: (8, 8)})


def test_dense_and_experts_in_one_block_are_not_chosen_between():
    shapes = moe_shapes() | {"model.layers.1.mlp.down_proj.weight": (8, 5)}
    with pytest.raises(UnsupportedModel, match="Block 1 has both"):
        anatomy_of(MOE_CONFIG).writers(shapes)


def test_blocks_that_predict_further_tokens_are_left_alone():
    anatomy, shapes = anatomy_of(MOE_CONFIG), moe_shapes()
    extra = {
        "model.layers.2.self_attn.o_proj.weight": (8, 8),
        "model.layers.2.eh_proj.weight": (8, 16),
    }
    assert anatomy.writers(shapes | extra) == anatomy.writers(shapes)
    assert sum(anatomy.left_alone(shapes | extra).values()) == 2
    with pytest.raises(UnsupportedModel, match="there are 2 blocks"):
        anatomy_of({**MOE_CONFIG, "num_nextn_predict_layers": 0}).writers(shapes | extra)


@pytest.mark.parametrize(("shape", "axis"), [((4, 8, 6), 1), ((4, 6, 8), 2)])
def test_experts_whose_order_the_loader_tells_by_length(shape, axis):
    text = {"model_type": "qwen3_vl_moe_text", "num_hidden_layers": 1, "hidden_size": 8}
    anatomy = anatomy_of({"model_type": "qwen3_vl_moe", "text_config": text})
    experts = "model.language_model.layers.0.mlp.experts.down_proj"
    shapes = {
        "model.language_model.embed_tokens.weight": (9, 8),
        "model.language_model.layers.0.self_attn.o_proj.weight": (8, 8),
        experts: shape,
    }
    assert next(w for w in anatomy.writers(shapes) if w.name == experts).axis == axis
    with pytest.raises(UnsupportedModel, match=r"experts.*is square"):
        anatomy.writers({**shapes, experts: (4, 8, 8)})
