"""Strengths and directions by gradients: rows against one-by-one oracles, gradients, the front."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abliterator import pipeline
from abliterator.anatomy import anatomy_of
from abliterator.bake import EditSettings, bake, plan_edits, preview_edit
from abliterator.capture import capture
from abliterator.checkpoint import Checkpoint
from abliterator.directions import fit_directions, stack
from abliterator.engines import TransformersEngine
from abliterator.errors import DirectionError, GenerationError, RecipeError
from abliterator.evaluation import EditEvaluator, EvaluationContext, RenderedPrompts
from abliterator.judge import RuleJudge
from abliterator.model import load_model, render_chat
from abliterator.pipeline import Options
from abliterator.recipe import Tuning, load_recipe
from abliterator.record import Estimate, Trial
from abliterator.record import Tuning as TuningResult
from abliterator.subspace import orthonormal_basis
from abliterator.tuning import TunedEdit, TuningContext, prefer, tune
from abliterator.tuning._descend import descend
from abliterator.tuning._pairs import make_pairs, with_rejected
from abliterator.tuning._parameters import STRONGEST, EditParameters
from abliterator.tuning._rows import answer_logprobs, token_logprobs
from abliterator.tuning._trials import trial_of, with_front
from abliterator.tuning._types import PreferencePair, PreferencePairs, Row
from tests.model.seams import share_prefixes_from

DEMO = Path(__file__).parents[2] / "recipes" / "demo"
ROWS = (Row((4, 9, 17, 30), (11, 12, 13)), Row((5, 9), (20,)), Row((4, 8, 60, 61, 7), (9, 9)))


def basis_of(columns, *, d_model=32, seed=0):
    chance = torch.Generator().manual_seed(seed)
    return orthonormal_basis(torch.randn(columns, d_model, generator=chance, dtype=torch.float64))


def tiny_context(loaded, **config):
    """A model with gradients, and no prompts; `config` is what the recipe says of tuning."""
    checkpoint = Checkpoint.open(loaded.folder)
    nothing = RenderedPrompts((), ())
    evaluation = EvaluationContext(
        engine=TransformersEngine(loaded),
        plan=plan_edits(checkpoint, anatomy_of(checkpoint.config), EditSettings()),
        target=nothing,
        neutral=nothing,
        judge=RuleJudge(),
        max_new_tokens=8,
        kl_tokens=12,
        batch_size=4,
    )
    return TuningContext(evaluation, loaded, nothing, nothing, Tuning(**config))


def with_config(context, **config):
    return replace(context, config=Tuning(**config))


def pairs_of(*rejected):
    pairs = [PreferencePair(i, r.prompt, r.answer, (3, 4), rejected) for i, r in enumerate(ROWS)]
    return PreferencePairs(tuple(pairs), ROWS)


def hooks_of(model):
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


def no_step(name):
    """Nobody hears of steps."""


# ---- rows


@pytest.mark.parametrize("family", ["llama", "gemma", "qwen3"])
@pytest.mark.parametrize("shared", [(), (7, 8, 9, 10, 11, 12)])
def test_rows_in_one_batch_are_rows_one_by_one(tiny_loaded, family, shared):
    loaded = tiny_loaded(family)
    rows = [Row((*shared, *row.prompt), row.answer) for row in ROWS]
    for row, logprobs in zip(rows, answer_logprobs(loaded, rows), strict=True):
        whole = loaded.model(torch.tensor([[*row.prompt, *row.answer]])).logits[0].log_softmax(1)
        alone = whole[len(row.prompt) - 1 : -1]
        assert logprobs.shape == alone.shape == (len(row.answer), whole.shape[1])
        torch.testing.assert_close(logprobs, alone, atol=1e-5, rtol=1e-5)
        picked = token_logprobs(logprobs, row.answer)
        expected = alone[range(len(row.answer)), list(row.answer)]
        torch.testing.assert_close(picked, expected, atol=1e-5, rtol=1e-5)
    # the head sees whole sequences again
    assert loaded.model(torch.tensor([[1, 2, 3]])).logits.shape[1] == 3


# ---- gradients


@pytest.mark.parametrize("family", ["llama", "llama_biased"])
def test_gradients_through_the_preview_are_finite_differences(tiny_folder, family):
    loaded = load_model(tiny_folder(family), device="cpu", dtype="float32")
    loaded.model.double()
    context = tiny_context(loaded)
    basis = basis_of(2).requires_grad_()
    modules = list(dict.fromkeys(edit.writer.module for edit in context.plan.edits))
    strengths = torch.full((len(modules),), 0.7, dtype=torch.float64, requires_grad=True)

    def loss(basis, strengths):
        named = dict(zip(modules, strengths, strict=True))
        with preview_edit(loaded, context.plan, basis, named):
            return loaded.model(torch.tensor([[4, 9, 17]])).logits[0, -1].log_softmax(0)[5]

    given = (basis, strengths)
    loss(*given).backward()
    step = 1e-3  # norms compute in float32, whatever the model's dtype
    for inputs, gradient in ((basis, basis.grad), (strengths, strengths.grad)):
        for place in (0, inputs.numel() // 2, inputs.numel() - 1):
            move = torch.zeros(inputs.numel(), dtype=torch.float64)
            move[place] = step
            moved = [
                loss(*(x + sign * move.reshape(x.shape) if x is inputs else x for x in given))
                for sign in (1, -1)
            ]
            found = (moved[0] - moved[1]).item() / (2 * step)
            expected = gradient.reshape(-1)[place].item()
            assert found == pytest.approx(expected, rel=0.02, abs=1e-4)
    assert gradient.abs().min() > 0  # every writer's strength matters


def test_gradients_flow_through_what_rows_share(tiny_loaded, monkeypatch):
    context = tiny_context(tiny_loaded("llama"))
    rows = [Row((7, 8, 9, 10, 11, 12, *row.prompt), row.answer) for row in ROWS]

    def gradient():
        basis = basis_of(2).requires_grad_()
        with preview_edit(context.loaded, context.plan, basis):
            found = answer_logprobs(context.loaded, rows)
        sum(logprobs[:, 3].sum() for logprobs in found).backward()
        return basis.grad

    shared = gradient()
    share_prefixes_from(monkeypatch, 100)
    torch.testing.assert_close(shared, gradient(), atol=1e-5, rtol=1e-4)
    assert shared.abs().max() > 1e-3


def test_what_is_not_tuned_stays(tiny_loaded):
    context = tiny_context(tiny_loaded("llama"), steps=3, batch=2, kl_weights=(1.0,))
    pairs, basis = pairs_of(), basis_of(2)
    before = {name: p.clone() for name, p in context.loaded.model.named_parameters()}
    hooks = hooks_of(context.loaded.model)  # transformers may have put its own there
    both, only_strengths, only_directions = (
        descend(replace(context, **kind), pairs, basis, on_step=no_step)[0]
        for kind in ({}, {"directions": False}, {"strengths": False})
    )
    torch.testing.assert_close(only_strengths.basis, basis, atol=1e-6, rtol=0)
    assert set(only_directions.strengths.values()) == {1.0}
    assert (both.basis - basis).abs().max() > 1e-3
    assert all(0 < s < STRONGEST for s in both.strengths.values())
    assert len(set(both.strengths.values())) == len(both.strengths) > 1
    for found in (both, only_strengths, only_directions):
        unit = found.basis.T @ found.basis
        torch.testing.assert_close(unit, torch.eye(2, dtype=torch.float64))
    after = dict(context.loaded.model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert hooks_of(context.loaded.model) == hooks


def test_a_subspace_of_each_block_is_tuned_block_by_block(tiny_loaded):
    context = tiny_context(tiny_loaded("llama"), steps=2, kl_weights=(1.0,))
    shared = basis_of(2)
    found = descend(context, pairs_of(), shared.expand(3, -1, -1), on_step=no_step)[0]
    for own in found.basis:
        torch.testing.assert_close(own.T @ own, torch.eye(2, dtype=torch.float64))
        assert (own - shared).abs().max() > 1e-3
    assert (found.basis[0] - found.basis[1]).abs().max() > 1e-3


def test_the_same_seed_finds_the_same(tiny_loaded):
    context = tiny_context(tiny_loaded("llama"), steps=2, batch=2, kl_weights=(1.0,))
    pairs = pairs_of()
    one, two = (descend(context, pairs, basis_of(1), on_step=no_step)[0] for _ in range(2))
    assert torch.equal(one.basis, two.basis)
    assert one.strengths == two.strengths


def test_each_phase_learns_what_the_one_before_it_left(tiny_loaded):
    context = tiny_context(tiny_loaded("llama"), steps=1, batch=2, kl_weights=(1.0, 2.0, 3.0))
    seen = []

    def ask_again(pairs, edit):
        seen.append((pairs, edit))
        return pairs_of((6, 6 + len(seen)))

    first = pairs_of()
    found = descend(context, first, basis_of(1), on_step=no_step, ask_again=ask_again)
    assert [edit for _, edit in seen] == found[:2]
    assert [pairs for pairs, _ in seen] == [first, pairs_of((6, 7))]


def test_a_rejected_response_becomes_less_likely_than_the_answer(tiny_loaded):
    context = tiny_context(tiny_loaded("llama"), steps=24, batch=3, kl_weights=(1e-3,))
    rejected = (11, 40)

    def margin(pairs):
        edit = descend(context, pairs, basis_of(1), on_step=no_step)[0]
        rows = [Row(row.prompt, answer) for row in ROWS for answer in (row.answer[:2], rejected)]
        with preview_edit(context.loaded, context.plan, edit.basis, edit.strengths):
            found = answer_logprobs(context.loaded, rows)
        said = [token_logprobs(x, r.answer).sum() for x, r in zip(found, rows, strict=True)]
        return float(sum(said[::2]) - sum(said[1::2]))

    assert margin(pairs_of(rejected, rejected)) > margin(pairs_of())


def test_strengths_start_half_way(tiny_loaded):
    parameters = EditParameters(tiny_context(tiny_loaded("llama")), basis_of(1))
    assert set(parameters.edit().strengths.values()) == {round(STRONGEST / 2, 4)}


def test_logits_that_are_nan_stop_the_descent(tiny_folder):
    loaded = load_model(tiny_folder("llama"), device="cpu", dtype="float32")
    context = tiny_context(loaded, steps=1)
    with torch.no_grad():
        loaded.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(GenerationError, match=r"logits .* are NaN"):
        descend(context, pairs_of(), basis_of(1), on_step=no_step)


# ---- the front


def trial(product, kl, *, refusal=0.0):
    def estimate(value):
        return Estimate(value=value, low=None, high=None, n=32)

    return Trial(
        kl_weight=1.0,
        scale=1.0,
        cosine=1.0,
        kl=kl,
        kl_first_token=kl,
        refusal=estimate(refusal),
        compliance=estimate(product),
        coherence=estimate(1.0),
        product=estimate(product),
    )


SPREAD = st.lists(
    st.tuples(st.integers(0, 8).map(lambda i: i / 8), st.integers(0, 8).map(lambda i: i / 80)),
    min_size=1,
    max_size=8,
)


@given(SPREAD)
def test_the_front_is_what_nothing_beats(values):
    found = with_front([trial(*value) for value in values])
    for (product, kl), told in zip(values, found, strict=True):
        beaten = any((p >= product and k <= kl) and (p > product or k < kl) for p, k in values)
        assert told.on_front is not beaten


@given(SPREAD)
def test_what_is_preferred_is_near_the_best_product_and_no_other_such_moves_less(values):
    trials = [trial(*value) for value in values]
    product, kl = values[prefer(trials, "product")]
    best = max(p for p, _ in values)
    assert product >= best - 0.02
    assert kl == min(k for p, k in values if p >= best - 0.02)


def test_limits_come_before_the_product():
    trials = [trial(0.9, 0.2, refusal=0.0), trial(0.6, 0.01, refusal=0.2), trial(0.1, 0.001)]
    assert prefer(trials, "product") == 0
    assert prefer(trials, "kl_at_most", 0.02) == 1
    assert prefer(trials, "refusals_at_most", 0.1) == 2  # the least KL among those that keep it
    with pytest.raises(DirectionError, match=r"keeps to 0\.0001 .*; the nearest has 0\.001"):
        prefer(trials, "kl_at_most", 0.0001)
    assert prefer(trials, "product", max_kl=0.1) == 1


def test_a_weaker_edit_is_the_same_subspace():
    edit = TunedEdit(basis_of(1), {"a": 1.0, "b": 0.4})
    weaker = edit.scaled(0.5)
    assert weaker.strengths == {"a": 0.5, "b": 0.2}
    assert torch.equal(weaker.basis, edit.basis)


# ---- the demo


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
        plan=plan_edits(checkpoint, anatomy_of(checkpoint.config), EditSettings()),
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
    trial = trial_of(measured, start, start, kl_weight=0.0, scale=1.0)
    assert trial.kl == pytest.approx(float(torch.cat([path.kl for path in measured.paths]).mean()))
    assert trial.kl_first_token == pytest.approx(measured.divergence.kl_first_token.value)


def test_what_no_judge_accepts_is_learned_against(demo):
    context, start = demo
    context = with_config(context, tokens=8)
    pairs = make_pairs(context, start)
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
        make_pairs(with_config(context, tokens=8), useless)


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


# ---- the stage

TUNED = ["edit.strength=auto", "directions.estimator=tuned", "tuning.steps=6"]
TUNED += ["tuning.kl_weights=[20]", "benchmarks.tasks=[]"]
FAST = Options(device="cpu", dtype="float32")


def recipe_with(*overrides):
    return load_recipe(DEMO.parent / "demo.yaml", overrides=[*TUNED, *overrides])


@pytest.mark.slow
def test_a_build_bakes_the_trial_it_selected(tmp_path):
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
    again = pipeline.build(recipe_with(), tmp_path / "again", options=FAST)
    assert again.tuning == record.tuning
    hashes = [e["sha256_after"] for e in edits]
    other = json.loads((tmp_path / "again/checkpoint/abliterator/edits.json").read_text())
    assert [e["sha256_after"] for e in other] == hashes


def test_the_plan_tells_what_tuning_costs(tmp_path):
    plan = pipeline.plan_recipe(recipe_with(), tmp_path)
    assert plan.tuning == {"steps": 6, "trials": 3, "answers_a_trial": 32, "tokens": 48}
    plain = load_recipe(DEMO.parent / "demo.yaml")
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
