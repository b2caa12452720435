"""The demo, tuned: trials, pairs and what is baked."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from abliterator.anatomy import anatomy_of
from abliterator.bake import bake, plan_edits, preview_edit
from abliterator.capture import capture
from abliterator.checkpoint import Checkpoint
from abliterator.directions import fit_directions, stack
from abliterator.engines import TransformersEngine
from abliterator.errors import DirectionError
from abliterator.evaluation import EditEvaluator, EvaluationContext, RenderedPrompts
from abliterator.judge import RuleJudge
from abliterator.model import load_model, render_chat
from abliterator.recipe import Edit, Tuning
from abliterator.tuning import TunedEdit, TuningContext, tune
from abliterator.tuning._pairs import base_answers, make_pairs, with_rejected
from abliterator.tuning._rows import answer_logprobs
from abliterator.tuning._trials import mean_divergence, trial_of
from abliterator.tuning._types import Row
from tests.tuning.contexts import basis_of, with_config

DEMO = Path(__file__).parents[2] / "recipes" / "demo"


@pytest.fixture(scope="module")
def demo():
    folder = Path(__file__).parents[2] / "abliterator" / "data" / "demo" / "model"
    loaded = load_model(folder, device="cpu", dtype="float32")
    engine = TransformersEngine(loaded)
    checkpoint = Checkpoint.open(folder)

    def rendered(name, part):
        lines = (DEMO / f"{name}.jsonl").read_text().splitlines()[part]
        prompts = [json.loads(line)["prompt"] for line in lines]
        ids = [render_chat(loaded.tokenizer, prompt) for prompt in prompts]
        return RenderedPrompts(prompts, ids)

    learned, held_out = slice(0, 32), slice(32, 56)
    evaluation = EvaluationContext(
        engine=engine,
        plan=plan_edits(checkpoint, anatomy_of(checkpoint.config), Edit()),
        target=rendered("target", held_out),
        neutral=rendered("neutral", held_out),
        judge=RuleJudge(),
        max_new_tokens=24,
        kl_tokens=12,
        batch_size=24,
    )
    context = TuningContext(
        evaluation=evaluation,
        loaded=loaded,
        target=rendered("target", learned),
        neutral=rendered("neutral", learned),
        config=Tuning(),
    )
    target, contrast = (
        capture(engine, rendered(name, learned).token_ids) for name in ("target", "contrast")
    )
    return context, stack(fit_directions(target, contrast), (4,)).basis


def test_the_demo_answers_at_a_fraction_of_the_divergence(demo, tmp_path):
    context, start = demo
    context = with_config(context, steps=8, kl_weights=(20.0,), scales=(1.0, 0.5))
    found = tune(context, start, scratch=tmp_path / "logits.bin")
    plain, tuned, half = found.trials
    assert found.preference_pairs == 32
    assert (plain.kl_weight, plain.scale, plain.cosine) == (0.0, 1.0, pytest.approx(1.0))
    assert plain.refusal.value <= 0.1
    assert tuned.refusal.value <= 0.1
    assert tuned.kl < plain.kl
    assert half.kl < tuned.kl
    assert tuned.product.value >= plain.product.value - 0.05
    assert not list(tmp_path.iterdir())


def test_a_trial_reads_the_paths_that_every_measurement_reads(demo, tmp_path):
    """Up to and with the position at which the base stops."""
    context, start = demo
    evaluation = replace(context.evaluation, kl_tokens=context.evaluation.max_new_tokens)
    with EditEvaluator(evaluation, tmp_path / "logits.bin") as evaluator:
        measured = evaluator.measure("the start", evaluation.writer_edit(start))
    answers = evaluation.engine.answers(
        evaluation.neutral.token_ids, max_new_tokens=evaluation.kl_tokens, batch_size=24
    )
    stopped = [answer.finish_reason == "stop" for answer in answers]
    assert any(stopped)
    for path, answer, one in zip(measured.paths, answers, stopped, strict=True):
        assert len(path.kl) == len(answer.token_ids) + one
    divergence = mean_divergence(measured.paths)
    trial = trial_of(measured.judged.summary, divergence, start, start, kl_weight=0.0, scale=1.0)
    assert trial.kl == pytest.approx(float(torch.cat([path.kl for path in measured.paths]).mean()))
    assert trial.kl_first_token == pytest.approx(measured.divergence.kl_first_token.value)


def test_what_no_judge_accepts_is_learned_against(demo):
    context, start = demo
    context = with_config(context, tokens=8)
    pairs = make_pairs(base_answers(context), start)
    modules = dict.fromkeys(edit.writer.module for edit in context.plan.edits)
    nothing, plain = (TunedEdit(start, dict.fromkeys(modules, s)) for s in (0.0, 1.0))
    # without an edit the model refuses as the base does
    found, n_rejected = with_rejected(context, pairs, nothing)
    assert n_rejected == len(pairs.target)
    assert all(pair.rejected == (pair.refusal,) for pair in found.target)
    # the latest first, and no more than are kept
    found, _ = with_rejected(with_config(context, tokens=6), found, nothing)
    found, _ = with_rejected(with_config(context, tokens=4), found, nothing)
    assert {tuple(map(len, pair.rejected)) for pair in found.target} == {(4, 6)}
    # the start edit gave the answers that were accepted
    same, n_rejected = with_rejected(context, pairs, plain)
    assert (same, n_rejected) == (pairs, 0)


def test_too_little_to_learn_from(demo):
    context, _ = demo
    useless = basis_of(1, d_model=context.plan.d_model)  # the model goes on refusing
    with pytest.raises(DirectionError, match=r"0 of 32 target prompts .* the base refuses 3"):
        make_pairs(base_answers(with_config(context, tokens=8)), useless)


def test_what_was_tuned_is_what_is_baked(demo, tmp_path):
    context, start = demo
    modules = dict.fromkeys(edit.writer.module for edit in context.plan.edits)
    strengths = {module: 0.05 * (i + 1) for i, module in enumerate(modules)}
    strengths[next(iter(modules))] = 0.0
    plan = context.plan.with_strengths(strengths)
    edits = bake(Checkpoint.open(context.loaded.folder), plan, start, tmp_path)
    assert len(edits) == len(context.plan.edits) - 1
    assert {edit.strength for edit in edits} == {s for s in strengths.values() if s}
    baked = load_model(tmp_path, device="cpu", dtype="float32")
    rows = [Row(tuple(ids), (5, 6)) for ids in context.evaluation.target.token_ids[:8]]
    written = answer_logprobs(baked, rows)
    with preview_edit(context.loaded, context.plan, start, strengths):
        previewed = answer_logprobs(context.loaded, rows)
    for one, other in zip(written, previewed, strict=True):
        torch.testing.assert_close(one, other, atol=0.05, rtol=0.02)  # stored in bfloat16
