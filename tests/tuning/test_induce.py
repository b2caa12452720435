"""The induce term: against an explicit addition, its gradient, what it changes, and its limits."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from abliterator import pipeline
from abliterator.engines import Steering, TransformersEngine
from abliterator.errors import DirectionError, RecipeError
from abliterator.files import Journal
from abliterator.model import load_model, render_chat
from abliterator.pipeline import Options
from abliterator.recipe import load_recipe
from abliterator.tuning._descend import _induce_loss, descend
from abliterator.tuning._kept import KeptSteps
from abliterator.tuning._parameters import EditParameters
from abliterator.tuning._rows import answer_logprobs, token_logprobs
from abliterator.tuning._types import Row
from tests.model.test_placement import machine_with_two_devices, needs_stand_in
from tests.tuning.contexts import (
    ROWS,
    basis_of,
    no_step,
    pairs_of,
    tiny_context,
    tiny_of,
    with_config,
)

RECIPE = Path(__file__).parents[2] / "recipes" / "demo.yaml"
FAST = Options(device="cpu", dtype="float32")
LAYER = 2
REFUSALS = [Row(row.prompt, (3, 4)) for row in ROWS]
TUNED = ["directions.estimator=tuned", "tuning.induce=1"]


def difference_along(basis, length=3.0):
    return Steering(LAYER, length * basis[:, 0])


def inducing(loaded, difference, **config):
    context = replace(tiny_context(loaded), difference=difference, strengths=False)
    return with_config(context, **config)


# ---- the term


@pytest.mark.parametrize("per_layer", [False, True])
def test_the_term_is_that_of_hidden_states_with_the_direction_added(tiny_loaded, per_layer):
    loaded, basis = tiny_loaded("llama"), basis_of(1)
    difference = difference_along(basis)
    context = inducing(loaded, difference, induce=1.0)
    if per_layer:
        basis = torch.stack([basis_of(1, seed=9), basis, basis_of(1, seed=8)])
    loss = _induce_loss(context, EditParameters(context, basis), difference, REFUSALS)
    # block by block: the rest of the model runs on what the second block wrote and r
    block = loaded.model.get_submodule(f"model.layers.{LAYER - 1}")
    logprobs = []
    for row in REFUSALS:
        handle = block.register_forward_hook(
            lambda module, args, out: (
                (out[0] if isinstance(out, tuple) else out) + difference.direction.float()
            )
        )
        ids = torch.tensor([[*row.prompt, *row.answer]])
        whole = loaded.model(ids).logits[0].double().log_softmax(1)
        handle.remove()
        places = range(len(row.prompt) - 1, len(row.prompt) + len(row.answer) - 1)
        logprobs += [whole[i, token] for i, token in zip(places, row.answer, strict=True)]
    expected = -float(sum(logprobs)) / len(logprobs)
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    unsteered = -torch.cat(
        [
            token_logprobs(x, row.answer)
            for x, row in zip(answer_logprobs(loaded, REFUSALS), REFUSALS, strict=True)
        ]
    ).mean()
    assert abs(loss.item() - unsteered.item()) > 1e-3


@pytest.mark.parametrize("name", ["llama", "deepseek_v4"])
def test_its_gradient_is_finite_differences(name, tiny_loaded, tmp_path):
    """Of one residual stream, and of several."""
    loaded = tiny_of(name, tiny_loaded, tmp_path)
    width = loaded.model.config.hidden_size
    basis = basis_of(1, d_model=width)
    difference = difference_along(basis)
    context = inducing(loaded, difference, induce=1.0)
    parameters = EditParameters(context, basis)
    columns = parameters.optimiser().param_groups[0]["params"][0]

    def loss():
        return _induce_loss(context, parameters, difference, REFUSALS[:1])

    loss().backward()
    gradient, start = columns.grad.clone(), columns.data.clone()
    assert gradient.abs().max() > 1e-4
    towards = gradient / gradient.norm()
    step = 1e-2  # of float32 numbers
    moved = []
    for sign in (1, -1):
        columns.data = start + sign * step * towards
        moved.append(loss().item())
    assert (moved[0] - moved[1]) / (2 * step) == pytest.approx(gradient.norm().item(), rel=0.02)


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_gradients_flow_to_what_is_added_after_a_pass_that_records_none(
    tiny_loaded, without_gradients
):
    loaded, ids = tiny_loaded("llama"), torch.tensor([[4, 9, 17]])
    direction = basis_of(1)[:, 0].requires_grad_()
    with TransformersEngine(loaded).edited(Steering(LAYER, direction)):
        with without_gradients():
            loaded.model(ids)
        loaded.model(ids).logits[0, -1].log_softmax(0)[5].backward()
    assert direction.grad.abs().max() > 1e-4


# ---- what it changes


def test_refusals_become_likelier_where_the_direction_is_added(tiny_loaded):
    """On prompts that the descent has not seen, and without an edit of the length."""
    loaded, basis = tiny_loaded("llama"), basis_of(1)
    difference = difference_along(basis)
    held_out = [Row(prompt, (3, 4)) for prompt in ((4, 21, 33), (5, 70, 12, 30), (90, 8, 15))]

    def induced(weight):
        config = {"steps": 24, "batch": 3, "kl_weights": (1.0,), "induce": weight}
        context = inducing(loaded, difference, **config)
        edit = descend(context, pairs_of(), basis, on_step=no_step)[0]
        assert set(edit.strengths.values()) == {1.0}
        parameters = EditParameters(context, edit.basis)
        return -_induce_loss(context, parameters, difference, held_out).item()

    assert induced(1.0) > induced(0.0) + 0.1


def test_a_weight_of_0_leaves_every_bit(tiny_loaded):
    loaded, basis = tiny_loaded("llama"), basis_of(1)
    plain = tiny_context(loaded, steps=3, batch=2, kl_weights=(1.0, 2.0))
    given = replace(plain, difference=difference_along(basis))
    rejected = pairs_of((11, 40))  # of which and the refusal one is drawn in each step
    one, other = (descend(c, rejected, basis, on_step=no_step) for c in (plain, given))
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.basis, b.basis)
        assert a.strengths == b.strengths


def test_an_interrupted_descent_finds_the_same_with_it(tiny_folder, tmp_path):
    loaded, basis = load_model(tiny_folder("llama"), device="cpu", dtype="float32"), basis_of(1)
    config = {"steps": 2, "batch": 2, "kl_weights": (1.0, 2.0, 3.0), "induce": 0.5}
    context = inducing(loaded, difference_along(basis), **config)
    pairs = pairs_of((11, 40))
    # refusals differ, so that which of them is drawn matters
    drawn = [pair._replace(refusal=(3, 4 + i)) for i, pair in enumerate(pairs.target)]
    pairs = replace(pairs, target=tuple(drawn))
    expected = descend(context, pairs, basis, on_step=no_step)
    steps = []

    def interrupt(name):
        steps.append(name)
        if len(steps) == 3:  # in the second phase
            raise KeyboardInterrupt

    path = tmp_path / "steps.jsonl"
    with pytest.raises(KeyboardInterrupt):
        descend(context, pairs, basis, on_step=interrupt, kept=KeptSteps(Journal(path)))
    edits = descend(context, pairs, basis, on_step=interrupt, kept=KeptSteps(Journal(path)))
    assert len(steps) == 3 + 4
    assert all(torch.equal(a.basis, b.basis) for a, b in zip(edits, expected, strict=True))


@needs_stand_in
def test_a_model_on_two_devices_finds_the_same_with_it(tiny_folder):
    edits, basis = [], basis_of(1)
    with machine_with_two_devices():
        for device in ("fake", "balanced"):
            loaded = load_model(tiny_folder("llama"), dtype="float32", device=device)
            config = {"steps": 2, "batch": 2, "kl_weights": (1.0,), "induce": 1.0}
            context = inducing(loaded, difference_along(basis), **config)
            edits += descend(context, pairs_of(), basis, on_step=no_step)
    assert {*loaded.placement.values()} == {"fake:0", "fake:1"}
    assert torch.equal(edits[0].basis, edits[1].basis)


@pytest.mark.slow
def test_a_build_with_it_finds_a_direction_that_induces(tmp_path):
    """On prompts that only the evaluation reads; with `per_layer`, that of the first layer."""
    overrides = [
        "directions.stack=per_layer",
        "layers=[4, 3]",
        "tuning.steps=6",
        "tuning.scales=[1]",
    ]
    overrides += ["tuning.kl_weights=[20]", "benchmarks.tasks=[]"]
    recipe = load_recipe(RECIPE, overrides=[*TUNED, *overrides])
    record = pipeline.build(recipe, tmp_path, options=FAST)
    assert record.behaviour["target"].edited.refusal.value <= 0.1
    work = tmp_path / "work"
    length = load_file(work / "directions.safetensors")["directions"][4 - 1].norm()
    bases = load_file(work / "tuning.safetensors")["bases"]
    rows = (json.loads(line) for line in (work / "rollouts.jsonl").read_text().splitlines())
    by_set = {"target": [], "neutral": []}
    for row in rows:
        if row["side"] == "base":
            by_set[row["set"]].append(row)
    folder = Path(pipeline.__file__).parents[1] / "data" / "demo" / "model"
    loaded = load_model(folder, device="cpu", dtype="float32")
    refusal = loaded.tokenizer(by_set["target"][0]["response"], add_special_tokens=False).input_ids
    refusals = [
        Row(tuple(render_chat(loaded.tokenizer, row["prompt"])), tuple(refusal))
        for row in by_set["neutral"]
    ]

    def surprise(basis):
        with TransformersEngine(loaded).edited(Steering(4, basis[4 - 1, :, 0] * length)):
            found = answer_logprobs(loaded, refusals)
        return -torch.cat([token_logprobs(x, tuple(refusal)) for x in found]).mean().item()

    start, tuned = map(surprise, bases)
    assert tuned < start - 0.1


# ---- limits


@pytest.mark.parametrize(
    "overrides",
    [
        ["directions.estimator=mean_difference", "edit.strength=auto"],
        ["k=2", "layers=[3, 4]"],
        ["k=auto"],
        ["directions.stack=per_writer"],
        ["directions.stack=som"],
    ],
)
def test_it_needs_one_tuned_direction(overrides):
    with pytest.raises(RecipeError, match=r"tuning\.induce"):
        load_recipe(RECIPE, overrides=[*TUNED, *overrides])


def test_a_negative_weight_is_an_error():
    with pytest.raises(RecipeError, match="greater than or equal to 0"):
        load_recipe(RECIPE, overrides=["directions.estimator=tuned", "tuning.induce=-1"])


def test_a_context_without_the_difference_is_an_error(tiny_loaded):
    with pytest.raises(DirectionError, match=r"TuningContext\.difference"):
        tiny_context(tiny_loaded("llama"), induce=1.0)


def test_recipes_without_it_keep_their_digest():
    plain = load_recipe(RECIPE, overrides=TUNED[:1])
    assert "induce" not in plain.published()["tuning"]
    assert load_recipe(RECIPE, overrides=[*TUNED[:1], "tuning.induce=0"]).digest == plain.digest
    assert load_recipe(RECIPE, overrides=TUNED).digest != plain.digest
    load_recipe(RECIPE, overrides=[*TUNED, "directions.stack=per_layer"])
