"""Types that are edited in part (`edit.partial`), each proven in both of its halves.

What the blocks of the edited model newly write has nothing along the directions, to 1e-6 in
float32, by weights and by hooks. What they hand on from their input, by the formula of each type
that is written out here, brings the directions back: the negative.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from abliterator.anatomy import anatomy_of, partial_model_types, partial_reason
from abliterator.bake import bake, plan_edits, preview_edit
from abliterator.checkpoint import Checkpoint
from abliterator.engines import AnswerPath, TransformersEngine, WriterEdit
from abliterator.errors import RecipeError, UnsupportedModel
from abliterator.model import LoadedModel
from abliterator.recipe import Edit
from tests.helpers.architectures import basis, save, tokens


def doge(block, at):
    entered, left = at()
    return left - block.post_attention_residual * block.input_residual * entered


def zaya(block, at):
    entered, left = at()
    for scaling in (block.post_attention_residual_scale, block.post_mlp_residual_scale):
        entered = (entered + scaling.residual_bias) * scaling.residual_scale
        entered = entered + scaling.hidden_states_bias * scaling.hidden_states_scale
    return left - entered


def minimax(block, at):
    before, _ = at("post_attention_layernorm")
    norm = block.post_attention_layernorm
    factor = norm.weight * (before.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    copied = block.attn_alpha_factor * at("input_layernorm")[1]
    return at()[1] - block.mlp_alpha_factor * factor * copied


def longcat_flash(block, at):
    entered, left = at()
    hidden, indices, weights = at("mlp.experts", inputs=3)
    is_copy = indices >= block.mlp.experts.num_routed_experts
    copied = (weights * is_copy).sum(-1, keepdim=True) * hidden
    assert copied.any()
    return left - entered - copied.view_as(entered)


def gemma3n_text(block, at):
    """[S, N, T, H]: what the block writes into each of its streams."""
    streams, left = at()
    predicted = block.altup.predict(streams)
    active = predicted[0]
    activated = at("pre_feedforward_layernorm")[0] + at("post_feedforward_layernorm")[1]
    router = block.altup.compute_router_modalities(activated)
    coefficients = (block.altup.correction_coefs(router) + 1).permute(2, 0, 1)[..., None]
    copied = (active + at("input_layernorm")[1]) / 2**0.5 - active
    return left - predicted - coefficients * copied


WRITES = {f.__name__: f for f in (doge, gemma3n_text, longcat_flash, minimax, zaya)}


@pytest.fixture(scope="module", params=sorted(WRITES))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    return save(name, tmp_path_factory.mktemp(name))


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def vanilla(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def planned(folder, **settings):
    checkpoint = Checkpoint.open(folder)
    settings = {"partial": True, **settings}
    return checkpoint, plan_edits(checkpoint, anatomy_of(checkpoint.config), Edit(**settings))


def calls_of_blocks(model):
    """By block and module within it: (inputs, output) of its call in one pass."""
    calls, handles = {}, []

    def record(key, _module, args, kwargs, output):
        inputs = (*args, *kwargs.values())
        calls[key] = inputs, output[0] if isinstance(output, tuple) else output.clone()

    for layer, block in enumerate(model.model.layers):
        for path, module in block.named_modules():
            hook = partial(record, (layer, path))
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        with torch.inference_mode():
            model(input_ids=tokens(), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def share_within(written):
    """The largest share of a position's numbers that lies in the subspace."""
    written = written.double()
    return float(((written @ basis()).norm(dim=-1) / written.norm(dim=-1)).max())


def newly_written(name, model):
    """By block, the share in the subspace of what it writes that is no copy of its input."""
    calls, shares = calls_of_blocks(model), []
    for layer, block in enumerate(model.model.layers):

        def at(path="", inputs=1, layer=layer):
            given, output = calls[layer, path]
            return given[:inputs] if inputs > 1 else (given[0], output)

        with torch.inference_mode():
            shares.append(share_within(WRITES[name](block, at)))
    return shares


def test_what_blocks_write_is_exact_and_what_they_hand_on_remains(name, folder, tmp_path):
    checkpoint, plan = planned(folder)
    model = vanilla(folder)
    loaded = LoadedModel(model, None, folder, "cpu")
    assert min(newly_written(name, model)) > 0.03  # before the edit

    edits = bake(checkpoint, plan, basis(), tmp_path / "out")
    assert all(edit.leak < 1e-6 for edit in edits)
    edited = vanilla(tmp_path / "out")
    assert max(newly_written(name, edited)) < 1e-6
    calls = calls_of_blocks(edited)
    for layer in range(len(edited.model.layers)):
        inputs, left = calls[layer, ""]
        assert share_within(left - inputs[0]) > 0.01  # the part that remains

    with torch.inference_mode():
        baked = edited(tokens(), use_cache=False).logits
        with preview_edit(loaded, plan, basis()):
            previewed = model(tokens(), use_cache=False).logits
            assert max(newly_written(name, model)) < 1e-6
    torch.testing.assert_close(previewed, baked, rtol=1e-3, atol=1e-3)

    for component in {edit.writer.component for edit in plan.edits}:
        strength = {e.writer.component: 1.0 for e in plan.edits} | {"mlp": 1.0, component: 0.0}
        _, without = planned(folder, strength=strength)
        with preview_edit(loaded, without, basis()):
            assert max(newly_written(name, model)) > 1e-3, component

    if any(edit.writer.gains for edit in plan.edits):
        plain = (replace(e, writer=replace(e.writer, gains=())) for e in plan.edits)
        with preview_edit(loaded, replace(plan, edits=tuple(plain)), basis()):
            assert min(newly_written(name, model)) > 0.01


@pytest.mark.parametrize("name", ["longcat_flash", "minimax"])
def test_experts_fused_on_disk(name, tmp_path):
    folder = save(name, tmp_path / "base", save_original_format=False)
    checkpoint, plan = planned(folder)
    assert any(e.writer.fused for e in plan.edits)
    bake(checkpoint, plan, basis(), tmp_path / "out")
    assert max(newly_written(name, vanilla(tmp_path / "out"))) < 1e-6
    model = vanilla(folder)
    with preview_edit(LoadedModel(model, None, folder, "cpu"), plan, basis()):
        assert max(newly_written(name, model)) < 1e-6


def test_gemma3n_is_edited_in_its_text_half(tmp_path):
    """Its vision tower needs a library (timm), so the text half alone is run."""
    folder, whole = save("gemma3n_text", tmp_path / "text"), tmp_path / "whole"
    text, config = load_file(folder / "model.safetensors"), read_config(folder)
    tower = {"model.vision_tower.x": torch.ones(2), "model.embed_vision.x": torch.ones(2)}
    names = {name: name.replace("model.", "model.language_model.", 1) for name in text}
    whole.mkdir()
    save_file({names[n]: t for n, t in text.items()} | tower, whole / "model.safetensors")
    outer = {"model_type": "gemma3n", "text_config": config}
    (whole / "config.json").write_text(json.dumps(outer))

    with pytest.raises(UnsupportedModel, match="A gemma3n can be edited in part only"):
        planned(whole, partial=False)
    checkpoint, plan = planned(whole)
    assert plan.edits[0].writer.module.startswith("model.language_model.layers.0.")
    bake(checkpoint, plan, basis(), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in tower.items())
    edited = {name: written[names[name]] for name in text}
    save_file(edited, folder / "model.safetensors", metadata={"format": "pt"})
    assert max(newly_written("gemma3n_text", vanilla(folder))) < 1e-6


def test_the_key_is_needed_and_the_error_says_what_it_does(name, folder):
    reason = partial_model_types()[name]
    with pytest.raises(UnsupportedModel, match="in part only") as raised:
        planned(folder, partial=False)
    assert reason in str(raised.value)
    assert "`edit.partial: true`" in str(raised.value)
    assert partial_reason(Checkpoint.open(folder).config) == reason


def test_the_key_is_refused_where_the_edit_is_whole(tmp_path):
    with pytest.raises(RecipeError, match=r"`edit.partial: true`.*llama"):
        planned(save("llama", tmp_path))


def test_every_partial_type_of_the_table_is_proven_here():
    of_wrapper = {"gemma3n"}  # its text half is gemma3n_text
    assert {*partial_model_types()} - of_wrapper == {*WRITES}
    assert {*WRITES} <= {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}


@pytest.mark.parametrize(
    ("config", "is_partial"),
    [
        ({"model_type": "gemma3n", "text_config": {}}, True),
        ({"model_type": "llava", "text_config": {"model_type": "minimax"}}, True),
        ({"model_type": "llama", "text_config": None}, False),
        ({"model_type": ["minimax"]}, False),
        ({}, False),
    ],
)
def test_the_reason_is_read_from_a_config_of_any_kind(config, is_partial):
    assert (partial_reason(config) is not None) == is_partial


def test_edits_side_by_side_leave_copies_alone(tmp_path):
    """LongCat-Flash's experts run once more for the share of those that compute something."""
    folder = save("longcat_flash", tmp_path)
    engine = TransformersEngine(LoadedModel(vanilla(folder), None, folder, "cpu"))
    _, plan = planned(folder)
    paths = [AnswerPath(tuple(row), 2) for row in tokens().tolist()]
    edits = [WriterEdit(plan, basis()), WriterEdit(plan, basis()[:, :1].contiguous())]
    alone = []
    for edit in edits:
        with engine.edited(edit):
            alone.append([rows for _, rows in sorted(engine.logits(paths, max_batch_tokens=64))])
    assert (alone[0][0] - alone[1][0]).abs().max() > 0.01
    with engine.edited_side_by_side(edits, max_batch_tokens=512) as together:
        for edit, path, rows in together.logits(paths):
            torch.testing.assert_close(rows, alone[edit][path], rtol=1e-3, atol=1e-3)
