"""Models that also see, from a recipe to a measured checkpoint: what is edited is their text half.

A wrapper's config.json says of itself little that a causal LM's does, its language model is deeper
in memory, and Mllama leaves blocks out where there is no image.
"""

from __future__ import annotations

import json

import pytest
import torch

from abliterator import pipeline
from abliterator.anatomy import anatomy_of
from abliterator.checkpoint import Checkpoint
from abliterator.engines import TransformersEngine
from abliterator.errors import DirectionError
from abliterator.model import load_model
from abliterator.pipeline import Options
from abliterator.recipe import load_recipe
from abliterator.verification import verify
from tests.helpers import architectures, tiny
from tests.pipeline.test_pipeline import NEUTRAL, TARGET


@pytest.fixture
def project(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setitem(architectures.WANTED, "vocab_size", tiny.VOCABULARY)
    monkeypatch.setitem(architectures.WANTED, "max_position_embeddings", 256)
    (tmp_path / "target.txt").write_text("\n".join(TARGET))
    (tmp_path / "neutral.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in NEUTRAL))

    def recipe(name: str, layers: list[int]):
        folder = architectures.save(name, tmp_path / "model")
        tiny_tokenizer.save_pretrained(folder)
        (tmp_path / "r.yaml").write_text(
            f"model: {folder}\nlayers: {layers}\nk: {len(layers)}\n"
            "prompts: {target: {path: target.txt}, neutral: {path: neutral.jsonl}}\n"
            "rollouts: {max_new_tokens: 80, limit: 2}\n"
        )
        return load_recipe(tmp_path / "r.yaml")

    return recipe


@pytest.mark.parametrize("name", ["gemma3", "mllama", "qwen2_5_vl", "idefics3"])
def test_a_model_that_sees_is_built_and_verified(name, project, tmp_path):
    record = pipeline.build(project(name, [3, 1]), tmp_path / "out", options=Options(device="cpu"))
    assert record.edit.max_leak < 1e-5
    assert record.behaviour["target"].edited.refusal is not None
    assert verify(tmp_path / "model", tmp_path / "out" / "checkpoint").ok
    base = Checkpoint.open(tmp_path / "model")
    left_alone = anatomy_of(base.config).left_alone(base.tensors)
    assert left_alone["vision tower"]


def test_its_stop_tokens_are_those_of_its_language_model(project, tmp_path):
    project("gemma3", [1])
    loaded = load_model(tmp_path / "model", device="cpu", dtype="float32")
    loaded.model.config.get_text_config().eos_token_id = 77
    assert 77 in TransformersEngine(loaded).stop_ids


def test_a_block_that_text_leaves_out_has_no_direction_of_its_own(project, tmp_path):
    """Of Mllama's three blocks the second looks at images: what leaves it is what entered it."""
    with pytest.raises(DirectionError, match="layer 2 lies in the span of layer 1"):
        pipeline.build(project("mllama", [1, 2]), tmp_path / "out", options=Options(device="cpu"))


@pytest.mark.parametrize("published", [True, False])
def test_mllama_is_loaded_under_old_names_and_new(published, project, tmp_path, tiny_tokenizer):
    project("mllama", [1])
    folder = tmp_path / "again"
    architectures.save("mllama", folder, save_original_format=published)
    tiny_tokenizer.save_pretrained(folder)
    model = load_model(folder, device="cpu", dtype="float32").model
    base = load_model(tmp_path / "model", device="cpu", dtype="float32").model
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)
