"""A partial edit (`edit.partial`) from a recipe to its proof: every place that speaks of it."""

from __future__ import annotations

import json
import re

import pytest
from click.testing import CliRunner

from abliterator import pipeline
from abliterator.anatomy import partial_model_types
from abliterator.cli import main
from abliterator.errors import RecipeError, UnsupportedModel
from abliterator.pipeline import Options
from abliterator.recipe import load_recipe
from tests.helpers import architectures, tiny
from tests.pipeline.test_pipeline import NEUTRAL, TARGET

RECIPE = """\
model: {folder}
layers: [2]
k: 1
prompts: {{target: {{path: target.txt}}, neutral: {{path: neutral.jsonl}}}}
rollouts: {{max_new_tokens: 8, limit: 2}}
"""


@pytest.fixture
def project(tmp_path, tiny_tokenizer, monkeypatch):
    """A function of a model_type that makes a tiny model of it, and a recipe for it."""
    monkeypatch.setitem(architectures.WANTED, "vocab_size", tiny.VOCABULARY)
    monkeypatch.setitem(architectures.WANTED, "vocab_size_per_layer_input", tiny.VOCABULARY)
    monkeypatch.setitem(architectures.WANTED, "max_position_embeddings", 256)
    (tmp_path / "target.txt").write_text("\n".join(TARGET))
    (tmp_path / "neutral.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in NEUTRAL))

    def recipe(name: str, *overrides: str):
        folder = architectures.save(name, tmp_path / "model")
        tiny_tokenizer.save_pretrained(folder)
        path = tmp_path / "r.yaml"
        path.write_text(RECIPE.format(folder=folder))
        return load_recipe(path, overrides=overrides)

    return recipe


def invoked(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return re.sub(r"\s+", " ", result.output)


@pytest.mark.parametrize("name", ["doge", "gemma3n_text"])
def test_plan_card_and_verify_say_what_remains(name, project, tmp_path):
    reason, out = partial_model_types()[name], tmp_path / "out"
    record = pipeline.build(project(name, "edit.partial=true"), out, options=Options(device="cpu"))
    assert record.edit.partial == reason
    assert record.edit.max_leak < 1e-5
    card = re.sub(r"\s+", " ", (out / "checkpoint" / "README.md").read_text())
    assert "The edit is partial" in card
    assert card.count(reason) == 2
    assert record.recipe["edit"]["partial"] is True

    planned = invoked("plan", tmp_path / "r.yaml", "--set", "edit.partial=true", "--out", out)
    verified = invoked("verify", out)
    assert reason in planned
    assert reason in verified
    assert "partial proven of what the writers write" in verified
    assert json.loads(invoked("verify", out, "--json"))["partial"] == reason


@pytest.mark.parametrize(
    ("name", "override", "error", "words"),
    [
        ("doge", "edit.partial=false", UnsupportedModel, "Set `edit.partial: true`"),
        ("llama", "edit.partial=true", RecipeError, "Leave `edit.partial` out"),
    ],
)
def test_a_key_that_does_not_fit_the_model_stops_before_anything_is_written(
    name, override, error, words, project, tmp_path
):
    recipe = project(name, override)
    with pytest.raises(error, match=words):
        pipeline.build(recipe, tmp_path / "out", options=Options(device="cpu"))
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_a_first_recipe_sets_the_key_where_it_is_needed(project, tmp_path):
    project("minimax")
    written = invoked("init", tmp_path / "model")
    assert "partial: true" in written
    assert partial_model_types()["minimax"] in written.replace("# ", "")
    path = tmp_path / "first.yaml"
    invoked("init", tmp_path / "model", "--out", path)
    assert load_recipe(path).edit.partial


def test_the_key_left_out_is_no_part_of_a_recipe(project):
    plain, off = project("llama"), project("llama", "edit.partial=false")
    assert "partial" not in plain.published()["edit"]
    assert plain.digest == off.digest
    assert project("doge", "edit.partial=true").digest != plain.digest
