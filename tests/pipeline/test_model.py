"""A model in a notebook, and the notebook itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from abliterator import Model
from abliterator.errors import CheckpointError, DirectionError, OutputError
from abliterator.model import template_tail
from abliterator.recipe import Edit

ROOT = Path(__file__).parents[2]
QUESTION = "Please say what the cooking of Foxholm is."


@pytest.fixture(scope="module")
def model():
    return Model("embedded:demo", device="cpu")


@pytest.fixture(scope="module")
def directions(model):
    prompts = ROOT / "recipes" / "demo"
    return model.directions(prompts / "target.jsonl", prompts / "contrast.jsonl")


def test_the_notebook_runs(tmp_path, monkeypatch):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "examples" / "model.ipynb").read_text("utf-8"))
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert "sorry" in names["before"][0]
    assert "sorry" not in names["after"][0]
    assert len(names["edits"]) == 14
    assert max(edit.leak for edit in names["edits"]) < 1e-4
    assert (tmp_path / "out" / "edited" / "config.json").is_file()


def test_the_heatmap_is_a_figure_of_all_layers(model, directions):
    figure = model.heatmap(directions)
    (image,) = figure.axes[0].images
    cosines = image.get_array()
    assert cosines.shape == (7, 7)
    assert cosines.diagonal().tolist() == pytest.approx([1.0] * 7)


def test_texts_are_prompts_too(model):
    few = model.directions(["What does Neva cook?"], ["What does Neva wear?"])
    assert few.vectors.shape == (7, 128)


def test_the_baked_model_answers_as_the_preview_does(model, directions, tmp_path):
    subspace = model.subspace(directions, [4, 3])
    with model.preview(subspace, edit=Edit(strength=0.9)):
        previewed = model.answers([QUESTION])
    assert previewed != model.answers([QUESTION])
    model.bake(subspace, tmp_path / "edited", edit=Edit(strength=0.9))
    assert Model(tmp_path / "edited", device="cpu").answers([QUESTION]) == previewed
    with pytest.raises(OutputError, match="not an empty folder"):
        model.bake(subspace, tmp_path / "edited")


def test_a_model_that_is_not_there():
    with pytest.raises(CheckpointError):
        Model("./nothing")


def test_a_direction_at_the_end_of_the_users_text(model):
    """What the template puts behind it is the same in both kinds."""
    target, contrast = ["Where is Neva?", "Where is it?"], ["What is Neva?", "What is it?"]
    found = model.directions(target, contrast, position="instruction").vectors
    tail = len(template_tail(model._engine.tokenizer))
    further_in = model.directions(target, contrast, position=-tail - 1).vectors
    torch.testing.assert_close(found, further_in, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, model.directions(target, contrast).vectors, atol=1e-2)
    with pytest.raises(DirectionError, match="'after_thinking' is no position here"):
        model.directions(target, contrast, position="after_thinking")


def test_another_estimator_removes_the_behaviour_too(model, directions):
    prompts = [ROOT / "recipes" / "demo" / f"{name}.jsonl" for name in ("target", "contrast")]
    found = model.directions(*prompts, estimator="logistic")
    cosines = torch.cosine_similarity(found.vectors, directions.vectors)
    assert 0.1 < cosines[3] < 0.999
    with model.preview(model.subspace(found, [4])):
        (answer,) = model.answers([QUESTION])
    assert "sorry" not in answer
    with pytest.raises(DirectionError, match=r"no estimator other; .* whitened, logistic"):
        model.directions(*prompts, estimator="other")
