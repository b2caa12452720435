"""Blocks that hold several residual streams (hyper-connections): what an edit reaches.

That every sublayer's write is exact after a bake, for each of these types, is in
tests/anatomy/test_architectures.py; bit by bit in pieces, in test_streamed_types.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from abliterator.capture import capture
from abliterator.directions import fit_directions
from abliterator.engines import AnswerPath, Steering, StreamEdit, TransformersEngine, WriterEdit
from abliterator.errors import UnsupportedModel
from abliterator.model import LoadedModel, hooked
from tests.anatomy.test_architectures import basis, planned, tokens, vanilla
from tests.helpers.architectures import D_MODEL, save
from tests.helpers.leak import leak_meter

# Streams in a dimension of their own, with and without a mixing of one another; beside one another.
NAMES = ("deepseek_v4", "glm5_next", "hy_v4", "qwen4_exp_text")
OTHER_TOKENS = torch.randint(4, 96, (3, 9), generator=torch.Generator().manual_seed(11))


@pytest.fixture(scope="module", params=NAMES)
def engine(request, tmp_path_factory):
    folder = save(request.param, tmp_path_factory.mktemp(request.param))
    return TransformersEngine(LoadedModel(vanilla(folder), None, folder, "cpu"))


def streams(engine, ids) -> torch.Tensor:
    """[L, B, T, S, H]: every stream after every block."""
    after = []
    with (
        torch.inference_mode(),
        hooked(engine.loaded.model, dict.fromkeys(engine.blocks, after.append)),
    ):
        engine.loaded.model(ids, use_cache=False)
    return torch.stack(
        [h.unflatten(-1, (-1, D_MODEL)).reshape(*h.shape[:2], -1, D_MODEL) for h in after]
    )


def share_within(hidden, q) -> torch.Tensor:
    """By block, the largest |Qᵀ h| / |h|."""
    return ((hidden.double() @ q).norm(dim=-1) / hidden.norm(dim=-1)).flatten(1).amax(dim=1)


def logits(engine) -> torch.Tensor:
    with torch.inference_mode():
        return engine.loaded.model(tokens(), use_cache=False).logits


def test_the_streams_keep_what_the_embedding_has_of_the_subspace(engine):
    _, plan = planned(engine.loaded.folder)
    with engine.edited(WriterEdit(plan, basis())):
        assert max(leak_meter(engine.loaded.model, basis(), tokens())) < 1e-6
        assert share_within(streams(engine, tokens()), basis()).min() > 0.05

    _, with_embeddings = planned(engine.loaded.folder, embeddings=True)
    with engine.edited(WriterEdit(with_embeddings, basis())):
        left = share_within(streams(engine, tokens()), basis())
    # the embeddings of n-grams, which the last block of this model adds, have no exact edit
    has_ngrams = "qwen4" in engine.loaded.model.config.model_type
    assert left[:2].max() < 1e-6
    assert (left[2] > 0.01) if has_ngrams else (left[2] < 1e-6)


def test_an_edit_that_misses_one_writer_is_seen(engine):
    _, plan = planned(engine.loaded.folder)
    modules = {edit.writer.module for edit in plan.edits}
    for left_out in modules:
        edits = tuple(edit for edit in plan.edits if edit.writer.module != left_out)
        with engine.edited(WriterEdit(replace(plan, edits=edits), basis())):
            leaks = leak_meter(engine.loaded.model, basis(), tokens())
        assert sum(leak > 1e-3 for leak in leaks) == 1, left_out


def test_the_direction_of_the_streams_is_another_one(engine):
    sets = (tokens(), OTHER_TOKENS)
    directions = fit_directions(*(capture(engine, ids.tolist()) for ids in sets)).vectors
    means = [streams(engine, ids)[:, :, -1].mean(dim=(1, 2)) for ids in sets]
    cosines = torch.cosine_similarity(directions, (means[0] - means[1]).double())
    # after the first block, the embedding alone tells them apart, and here it is small
    assert cosines[1:].abs().max() < 0.9


def test_a_removal_after_blocks_is_of_every_stream(engine):
    q, before = basis(), logits(engine)
    with engine.edited(StreamEdit(q, alpha=0.0)):
        assert torch.equal(logits(engine), before)
    with engine.edited(StreamEdit(q, alpha=1.0)):
        assert share_within(streams(engine, tokens()), q).max() < 1e-5
        after_layer = logits(engine)
    _, plan = planned(engine.loaded.folder)
    with engine.edited(WriterEdit(plan, q)):
        at_writers = logits(engine)
    for one, other in ((before, after_layer), (before, at_writers), (after_layer, at_writers)):
        assert (one - other).abs().max() > 0.01


def test_a_direction_is_added_to_every_stream_alone_and_side_by_side(engine):
    check_addition(engine)


def check_addition(engine):
    generator = torch.Generator().manual_seed(13)
    edits = [Steering(layer, torch.randn(D_MODEL, generator=generator)) for layer in (1, 3, 3)]
    before = streams(engine, tokens())
    for edit in edits:
        with engine.edited(edit):
            moved = (streams(engine, tokens()) - before)[edit.layer - 1]
        torch.testing.assert_close(moved, edit.direction.expand_as(moved), rtol=1e-4, atol=1e-4)

    paths = [AnswerPath(tuple(row), 2) for row in tokens().tolist()]
    alone = []
    for edit in edits:
        with engine.edited(edit):
            alone.append([x for _, x in sorted(engine.logits(paths, max_batch_tokens=64))])
    with engine.edited_side_by_side(edits, max_batch_tokens=512) as together:
        for edit, path, found in together.logits(paths):
            torch.testing.assert_close(found, alone[edit][path], rtol=1e-4, atol=1e-4)


def test_a_model_without_one_of_its_sublayers_is_named(engine):
    model, block = engine.loaded.model, engine.blocks[1]
    engine = TransformersEngine(engine.loaded)  # paths are found once
    mlp = model.get_submodule(block)._modules.pop("mlp")
    try:
        with pytest.raises(UnsupportedModel, match=rf"no module {block}\.mlp"):
            list(engine.hidden_states(tokens().tolist()))
    finally:
        model.get_submodule(block)._modules["mlp"] = mlp


def test_streams_may_lie_before_the_rows_of_a_batch(tmp_path):
    """Gemma 3n's blocks return [S, B, T, H]."""
    folder = save("gemma3n_text", tmp_path)
    engine = TransformersEngine(LoadedModel(vanilla(folder), None, folder, "cpu"))
    check_addition(engine)
