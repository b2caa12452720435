"""The controls of an edit: other directions, at its strengths and at its KL, and p-values."""

from dataclasses import replace

import pytest
import torch

from abliterator import pipeline
from abliterator.engines import TransformersEngine
from abliterator.errors import UnsupportedModel
from abliterator.evaluation import EditEvaluator
from abliterator.recipe import load_recipe
from abliterator.record import Study
from abliterator.study import study_controls, to_markdown
from abliterator.study._controls import (
    TOLERANCE,
    matched_edit,
    mean_products,
    random_like,
    scaled_edit,
)
from abliterator.subspace import orthonormal_basis
from tests.helpers.tiny import D_MODEL, N_LAYERS

OPTIONS = pipeline.Options(device="cpu", dtype="float32")


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


BASIS = orthonormal_basis(random(2, D_MODEL))


def test_controls_keep_the_strengths_and_change_the_directions(context, tmp_path):
    """One that is the edit itself does the same; at strength 0 none does anything."""
    with EditEvaluator(context, tmp_path / "logits.bin") as evaluator:
        study = study_controls(evaluator, BASIS, [BASIS], draws=2)
    base, edit, first, second, same = study.rows
    assert [row.name for row in study.rows[2:]] == [
        "random directions 1",
        "random directions 2",
        "shuffled labels 1",
    ]
    assert (same.answers, same.divergence) == (edit.answers, edit.divergence)
    kl = [row.divergence.kl.value for row in (edit, first, second)]
    assert min(kl) > 1e-4
    assert len(set(kl)) == 3
    nothing = {edit.writer.module: 0.0 for edit in context.plan.edits}
    still = replace(context, plan=context.plan.with_strengths(nothing))
    with EditEvaluator(still, tmp_path / "logits.bin") as evaluator:
        study = study_controls(evaluator, BASIS, [], draws=1)
    assert [row.divergence.kl.value for row in study.rows[1:]] == [0, 0]
    assert {row.answers for row in study.rows} == {base.answers}


def test_a_matched_control_moves_neutral_answers_as_far_as_the_edit(context, tmp_path):
    """At another factor on the strengths, whichever side of 1 it lies on."""
    with EditEvaluator(context, tmp_path / "logits.bin") as evaluator:
        study = study_controls(evaluator, BASIS, [], draws=2, matched=1)
        weak = evaluator.kl("weak", scaled_edit(context.plan, random_like(BASIS, 0), 0.3))
    edit, plain, matched = study.rows[1], study.rows[2], study.rows[-1]
    assert matched.name == f"random directions 1, matched KL, strength x {matched.scale:.3g}"
    kl = edit.divergence.kl.value
    assert abs(matched.divergence.kl.value / kl - 1) <= TOLERANCE
    assert abs(plain.divergence.kl.value / kl - 1) > TOLERANCE
    assert matched.scale != 1
    assert 0 < weak < plain.divergence.kl.value


def test_a_kl_that_no_strength_gives_is_not_called_matched(context, tmp_path):
    with EditEvaluator(context, tmp_path / "logits.bin") as evaluator:
        edit = matched_edit(evaluator, BASIS, 1e6, name="control")
    assert edit.name == f"control, nearest KL, strength x {edit.scale:.3g}"


def test_draws_that_are_the_edit_itself_reach_it_and_p_is_1(context, tmp_path):
    with EditEvaluator(context, tmp_path / "logits.bin") as evaluator:
        nulls = {"copies": [BASIS] * 3, "one": [BASIS, random_like(BASIS, 7)]}
        study = study_controls(evaluator, BASIS, [], draws=0, nulls=nulls, null_prompts=4)
    copies, one = study.nulls
    assert set(copies.values) == {copies.observed}
    assert copies.p_value == 1
    assert (copies.prompts, copies.tokens, copies.of) == (4, 48, "copies")
    assert one.values[0] == one.observed
    assert "| copies | 3 | 4 | mean product |" in to_markdown(study)
    assert Study.model_validate_json(study.model_dump_json()) == study


def test_edits_one_at_a_time_have_the_products_of_edits_side_by_side(context, monkeypatch):
    bases = [BASIS, random_like(BASIS, 1)]
    together = mean_products(context, bases)

    def refuse(*_, **__):
        raise UnsupportedModel("experts are modules of their own")

    monkeypatch.setattr(TransformersEngine, "edited_side_by_side", refuse)
    assert mean_products(context, bases) == together


def test_each_block_draws_its_own_where_each_has_its_own(context, tmp_path):
    bases = torch.stack([orthonormal_basis(random(1, D_MODEL))] * N_LAYERS)
    drawn = random_like(bases, 0)
    assert drawn.shape == bases.shape
    assert (drawn[0].T @ drawn[1]).abs() < 0.9
    assert not torch.equal(drawn, random_like(bases, 1))
    with EditEvaluator(context, tmp_path / "logits.bin") as evaluator:
        study = study_controls(evaluator, bases, [], draws=1)
    assert study.rows[2].divergence.kl.value > 1e-4


@pytest.mark.parametrize("stack", ["layers", "per_layer", "within_layer"])
def test_the_controls_are_of_the_edit_that_a_build_bakes(recipe, tmp_path, stack):
    read = load_recipe(recipe, overrides=[f"directions.stack={stack}", "selection.controls=2"])
    record = pipeline.build(read, tmp_path / "o", options=OPTIONS)
    settings = pipeline.StudySettings(draws=4)
    study = pipeline.run_study("controls", read, tmp_path / "o", settings, options=OPTIONS)
    target = record.behaviour["target"]
    assert (study.rows[0].answers, study.rows[1].answers) == (target.base, target.edited)
    kl = [row.divergence.kl.value for row in study.rows[1:]]
    assert kl[0] == pytest.approx(record.divergence.kl.value, rel=1e-3)
    matched = sum(row.scale is not None for row in study.rows)
    assert matched == 2
    assert len(kl) == len(set(kl)) == 5 + matched
    assert {null.of for null in study.nulls} == {"shuffled labels", "random directions"}
    for null in study.nulls:
        assert len(null.values) == settings.draws
        reached = sum(value >= null.observed for value in null.values)
        assert null.p_value == (1 + reached) / (1 + settings.draws)
