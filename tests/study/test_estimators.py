"""Estimators and stacks side by side, each compared with the first at the same strength."""

import pytest
import torch

from abliterator import pipeline
from abliterator.evaluation import EditEvaluator
from abliterator.plots import can_draw
from abliterator.recipe import load_recipe
from abliterator.record import Study
from abliterator.study import EstimatedEdit, study_estimators, to_markdown
from abliterator.subspace import orthonormal_basis
from tests.helpers.tiny import D_MODEL, N_LAYERS

OPTIONS = pipeline.Options(device="cpu", dtype="float32")


def basis(seed):
    generator = torch.Generator().manual_seed(seed)
    return orthonormal_basis(torch.randn(1, D_MODEL, generator=generator, dtype=torch.float64))


def test_the_same_subspace_differs_in_nothing_and_another_does(context, tmp_path):
    seeds = {"a": 1, "b": 1, "c": 2}
    edits = [EstimatedEdit(name, basis(seed), (2,)) for name, seed in seeds.items()]
    cosines = {"b": torch.ones(N_LAYERS)}
    with EditEvaluator(context, tmp_path / "logits.bin") as evaluator:
        study = study_estimators(evaluator, edits, scales=(0.5, 1.0), draws=1, cosines=cosines)
    names = [row.name for row in study.rows]
    expected = [f"{name}, strength x {scale}" for scale in ("0.5", "1") for name in "abc"]
    assert names[:-1] == ["base", *expected, "random directions 1"]
    assert names[-1].startswith("random directions 1, matched KL, strength x ")
    differences = {d.name: d for d in study.edit_differences}
    assert study.compared_with == "a"
    for scale in ("0.5", "1"):
        same, other = (differences[f"{name}, strength x {scale}"] for name in "bc")
        assert same.delta.product.value == same.kl.value == same.kl_first_token.value == 0
        assert other.kl.value != 0
        assert other.kl.n == len(context.neutral.prompts)
    kl = {row.name: row.divergence.kl.value for row in study.rows[1:]}
    assert 0 < kl["a, strength x 0.5"] < kl["a, strength x 1"]
    difference = kl["c, strength x 1"] - kl["a, strength x 1"]
    assert differences["c, strength x 1"].kl.value == pytest.approx(difference)
    text = to_markdown(study)
    assert "Less a at the same factor of the strengths, paired by prompt:" in text
    assert f"| {N_LAYERS} | 1.000 |" in text
    assert Study.model_validate_json(study.model_dump_json()) == study


def test_a_subspace_with_strengths_of_its_own_is_removed_at_these(context, tmp_path):
    weaker = {edit.writer.module: 0.25 * edit.strength for edit in context.plan.edits}
    alone = {**dict.fromkeys(weaker, 0.0), next(iter(weaker)): 1.0}  # a tuning may leave some out
    edits = [EstimatedEdit("a", basis(1), (2,))]
    for name, strengths in (("b", weaker), ("c", alone)):
        edits.append(EstimatedEdit(name, basis(1), (2,), context.plan.with_strengths(strengths)))
    with EditEvaluator(context, tmp_path / "logits.bin") as evaluator:
        study = study_estimators(evaluator, edits, scales=(0.25, 1.0), draws=0)
    kl = {row.name: row.divergence.kl.value for row in study.rows if row.divergence}
    assert kl["b, strength x 1"] == kl["a, strength x 0.25"] != kl["a, strength x 1"]
    assert 0 < kl["c, strength x 1"] != kl["a, strength x 1"]


def test_every_estimator_and_stack_is_measured_as_a_build_would(recipe, tmp_path):
    read = load_recipe(recipe, overrides=["selection.controls=1"])
    record = pipeline.build(read, tmp_path / "o", options=OPTIONS)
    settings = pipeline.StudySettings(scales=(1.0,))
    study = pipeline.run_study("estimators", read, tmp_path / "o", settings, options=OPTIONS)
    rows = {row.name: row for row in study.rows}
    plain = ["mean_difference", "whitened", "logistic"]
    stacks = ["mean_difference, per_layer", "within_layer, 3 directions", "som, 3 directions"]
    stacks.append("som, 3 directions one by one")
    assert {*plain, *stacks, "mean_difference at instruction", "random directions 1"} <= {*rows}
    target = record.behaviour["target"]
    assert rows["mean_difference"].answers == target.edited
    kl = {name: row.divergence.kl.value for name, row in rows.items() if row.divergence}
    assert kl["mean_difference"] == pytest.approx(record.divergence.kl.value, rel=1e-3)
    assert len(set(kl.values())) == len(kl)
    assert {c.name for c in study.cosines} == {*plain[1:], "mean_difference at instruction"}
    for column in study.cosines:
        assert len(column.cosines) == N_LAYERS
        assert all(-1 <= cosine < 1 - 1e-6 for cosine in column.cosines)
    assert (tmp_path / "o" / "work" / "studies" / "estimators.png").is_file() == can_draw()


def test_what_neutral_and_protected_prompts_remove_are_rows_of_their_own(recipe, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("Name a tree.\nName a river.\nName a town.\n")
    overrides = ["selection.controls=1", f"prompts.protect={{names: {{path: {names}}}}}"]
    read = load_recipe(recipe, overrides=overrides)
    settings = pipeline.StudySettings(scales=(1.0,), layers=(3, 2))
    study = pipeline.run_study("estimators", read, tmp_path / "o", settings, options=OPTIONS)
    rows = {row.name: row for row in study.rows}
    for removed in ("projected", "protected"):
        assert rows[f"mean_difference, {removed}"].layers == (3,)  # as --layers has it
        assert rows[f"mean_difference, {removed}"].divergence != rows["mean_difference"].divergence
    assert study.about["layers"] == (3, 2)
    assert study.about["protected, names"] == 3
