"""The stage of a build that tunes."""

import json
from pathlib import Path

import pytest

from abliterator import pipeline
from abliterator.errors import RecipeError
from abliterator.pipeline import Options
from abliterator.recipe import load_recipe
from abliterator.record import Tuning as TuningResult

TUNED = ["edit.strength=auto", "directions.estimator=tuned", "tuning.steps=6"]
TUNED += ["tuning.kl_weights=[20]", "benchmarks.tasks=[]"]
RECIPE = Path(__file__).parents[2] / "recipes" / "demo.yaml"
FAST = Options(device="cpu", dtype="float32")


def recipe_with(*overrides):
    return load_recipe(RECIPE, overrides=[*TUNED, *overrides])


@pytest.mark.slow
def test_a_build_bakes_the_trial_it_selected(tmp_path, monkeypatch):
    record = pipeline.build(recipe_with(), tmp_path / "out", options=FAST)
    tuning = json.loads((tmp_path / "out" / "work" / "tuning.json").read_text())
    selected = record.tuning.selected
    assert record.tuning == TuningResult(
        preference_pairs=tuning["preference_pairs"], trials=tuning["trials"], selected=selected
    )
    card = (tmp_path / "out/checkpoint/README.md").read_text()
    assert card.count("**taken**") == 1
    assert "Nothing was trained" not in card
    assert record.behaviour["target"].edited.refusal.value <= 0.05
    assert record.divergence.kl.value < 0.004  # the plain edit's
    edits = json.loads((tmp_path / "out/checkpoint/abliterator/edits.json").read_text())
    baked = {edit["name"].removesuffix(".weight"): edit["strength"] for edit in edits}
    assert baked == tuning["strengths"][selected]
    assert len(set(baked.values())) > 1
    settings = pipeline.StudySettings(scales=(1.0,))
    study = pipeline.run_study(
        "estimators", recipe_with(), tmp_path / "out", settings, options=FAST
    )
    rows = {row.name: row for row in study.rows}
    kl = rows["tuned, layers"].divergence.kl.value
    assert kl == pytest.approx(record.divergence.kl.value, rel=0.01)
    again = pipeline.build(recipe_with(), tmp_path / "again", options=FAST)
    assert again.tuning == record.tuning
    hashes = [e["sha256_after"] for e in edits]
    other = json.loads((tmp_path / "again/checkpoint/abliterator/edits.json").read_text())
    assert [e["sha256_after"] for e in other] == hashes
    # gradients flow through weights that are read from disk, too
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    spread = Options(device="auto", dtype="float32", max_memory=3_000_000)
    on_disk = pipeline.build(recipe_with(), tmp_path / "on_disk", options=spread)
    assert on_disk.tuning == record.tuning
    other = json.loads((tmp_path / "on_disk/checkpoint/abliterator/edits.json").read_text())
    assert [e["sha256_after"] for e in other] == hashes


def test_the_plan_tells_what_tuning_costs(tmp_path):
    plan = pipeline.plan_recipe(recipe_with(), tmp_path)
    assert plan.tuning == {"steps": 6, "trials": 3, "answers_a_trial": 32, "tokens": 48}
    plain = load_recipe(RECIPE)
    assert pipeline.plan_recipe(plain, tmp_path).tuning is None


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("edit.norm=column", "no run-time form"),
        ("tuning.prefer=kl_at_most", "at_most"),
        ("tuning.at_most=0.1", "at_most"),
        ("tuning.scales=[]", "must hold a number"),
        ("tuning.kl_weights=[0]", "greater than 0"),
    ],
)
def test_a_tuning_that_cannot_be_made(override, says, tmp_path):
    with pytest.raises(RecipeError, match=says):
        pipeline.plan_recipe(recipe_with(override), tmp_path)
