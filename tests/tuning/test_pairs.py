"""U and V of each module, tuned: gradients, bounds, the ridge, and a build."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from abliterator import pipeline
from abliterator.bake import preview_edit, start_pairs
from abliterator.checkpoint import Checkpoint
from abliterator.cli import main
from abliterator.directions import load_directions
from abliterator.errors import DirectionError, RecipeError
from abliterator.files import Journal
from abliterator.model import load_model
from abliterator.pipeline import Options
from abliterator.recipe import load_recipe
from abliterator.subspace import lengths_of, pair_cosines, pair_distances
from abliterator.tuning._descend import descend
from abliterator.tuning._kept import KeptSteps
from abliterator.tuning._parameters import STRONGEST, EditParameters
from tests.helpers.architectures import save
from tests.helpers.pairs import random_pairs
from tests.tuning.contexts import basis_of, no_step, pairs_of, tiny_context

RECIPE = Path(__file__).parents[2] / "recipes" / "demo.yaml"
FAST = Options(device="cpu", dtype="float32")


def start_of(context, r=2):
    checkpoint = Checkpoint.open(context.loaded.folder)
    return start_pairs(context.plan, checkpoint, basis_of(r)).float().double()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_gradients_are_finite_differences(family, tmp_path, tiny_folder):
    folder = tiny_folder() if family == "llama" else save(family, tmp_path / "model")
    loaded = replace(load_model(tiny_folder(), device="cpu", dtype="float32"), folder=folder)
    if family != "llama":
        from transformers import AutoModelForCausalLM

        loaded = replace(loaded, model=AutoModelForCausalLM.from_pretrained(folder).eval())
    loaded.model.double()
    context = tiny_context(loaded)
    pairs = random_pairs(context.plan, Checkpoint.open(folder)).requires_grad_()

    def loss(pairs):
        with preview_edit(loaded, context.plan, pairs):
            return loaded.model(torch.tensor([[4, 9, 17]])).logits[0, -1].log_softmax(0)[5]

    loss(pairs).backward()
    edited = sorted({context.plan.pair_of[e.writer.module] for e in context.plan.edits})
    assert pairs.grad[edited].abs().amax(dim=(2, 3)).min() > 0  # every module's U and V matter
    step = 1e-3  # norms compute in float32, whatever the model's dtype
    for place in [(edited[0], 0, 0, 0), (edited[1], 1, 5, 1), (edited[-1], 1, 31, 0)]:
        move = torch.zeros_like(pairs)
        move[place] = step
        found = (loss(pairs + move) - loss(pairs - move)).item() / (2 * step)
        assert found == pytest.approx(pairs.grad[place].item(), rel=0.02, abs=1e-4)


def test_a_start_is_the_start_edit_half_way(tiny_loaded):
    context = tiny_context(tiny_loaded("llama"))
    start = start_of(context)
    parameters = EditParameters(context, start)
    edit = parameters.edit()
    assert set(edit.strengths.values()) == {round(STRONGEST / 2, 4)}
    torch.testing.assert_close(edit.basis, start, rtol=0, atol=1e-6)
    assert parameters.ridge().item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("r", [1, 2])
def test_every_module_moves_and_stays_within_its_bounds(r, tiny_loaded):
    context = tiny_context(tiny_loaded("llama"), steps=4, batch=2, kl_weights=(1.0, 2.0))
    start = start_of(context, r)
    edits = descend(context, pairs_of(), start, on_step=no_step)
    for edit in edits:
        assert bool(edit.basis.isfinite().all())
        torch.testing.assert_close(lengths_of(edit.basis), lengths_of(start))
        torch.testing.assert_close(
            edit.basis[:, 1].norm(dim=1), torch.ones(len(start), r, dtype=torch.float64)
        )
        assert all(0 < strength < STRONGEST for strength in edit.strengths.values())
        assert torch.equal(edit.basis, edit.basis.float().double())  # as the file has it
    moved = [context.plan.pair_of[module] for module in edits[0].strengths]
    assert pair_cosines(edits[0].basis, start)[moved].max() < 0.9999
    assert (edits[0].basis[:, 0] - edits[0].basis[:, 1]).abs().max() > 1e-3  # U is not V


def test_a_larger_ridge_keeps_the_edit_nearer_to_its_start(tiny_loaded):
    distances = []
    for ridge in (0.0, 100.0):
        context = tiny_context(
            tiny_loaded("llama"), steps=8, batch=3, kl_weights=(1.0,), ridge=ridge
        )
        start = start_of(context)
        edit = descend(context, pairs_of(), start, on_step=no_step)[0]
        distances.append(pair_distances(edit.basis, start).mean().item())
    assert distances[1] < distances[0] / 4


def test_what_is_not_tuned_stays(tiny_loaded):
    context = tiny_context(tiny_loaded("llama"), steps=2, batch=2, kl_weights=(1.0,))
    start = start_of(context)
    fixed = replace(context, directions=False)
    edit = descend(fixed, pairs_of(), start, on_step=no_step)[0]
    torch.testing.assert_close(edit.basis, start, rtol=0, atol=1e-6)
    assert len(set(edit.strengths.values())) > 1


def test_a_phase_that_was_finished_is_read_without_loss(tiny_loaded, tmp_path):
    context = tiny_context(tiny_loaded("llama"), steps=2, batch=2, kl_weights=(1.0, 2.0))
    runs = []
    for _ in range(2):  # the second reads what the first kept
        kept = KeptSteps(Journal(tmp_path / "steps.jsonl"))
        runs.append(descend(context, pairs_of(), start_of(context), on_step=no_step, kept=kept))
    for edit, other in zip(*runs, strict=True):
        assert torch.equal(edit.basis, other.basis)
        assert edit.strengths == other.strengths


# ---- recipes and a build

OWN = ["directions.estimator=tuned", "directions.stack=per_writer", "edit.strength=auto"]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["directions.stack=per_writer"], "set `estimator: tuned`"),
        ([*OWN, "edit.norm=column"], "leave `norm: none`"),
        (["tuning.ridge=1"], "belong to `directions.stack: per_writer`"),
        (["tuning.max_change=0.1"], "belong to `directions.stack: per_writer`"),
        ([*OWN, "tuning.ridge=-1"], "greater than or equal to 0"),
        ([*OWN, "tuning.max_change=0"], "greater than 0"),
    ],
)
def test_recipes_that_say_something_else(overrides, says):
    with pytest.raises(RecipeError, match=says):
        load_recipe(RECIPE, overrides=overrides)


def test_keys_at_their_defaults_change_no_digest():
    plain, own = load_recipe(RECIPE), load_recipe(RECIPE, overrides=OWN)
    assert plain.published()["tuning"].keys() == own.published()["tuning"].keys()
    assert not {"ridge", "max_change"} & own.published()["tuning"].keys()
    ridged = load_recipe(RECIPE, overrides=[*OWN, "tuning.ridge=1"])
    assert ridged.published()["tuning"]["ridge"] == 1
    assert ridged.digest != own.digest


@pytest.mark.slow
def test_a_build_bakes_proves_and_refuses(tmp_path):
    overrides = [*OWN, "benchmarks.tasks=[]", "edit.output=both", "edit.biases=false"]
    overrides += ["tuning.steps=4", "tuning.kl_weights=[20]", "tuning.scales=[1.0]"]
    out = tmp_path / "out"
    recipe = load_recipe(RECIPE, overrides=overrides)
    record = pipeline.build(recipe, out, options=FAST)
    assert record.behaviour["target"].edited.refusal.value <= 0.1
    edits = json.loads((out / "checkpoint/abliterator/edits.json").read_text())
    assert {edit["subspace"] for edit in edits} == {"writer"}
    assert all(0 < edit["change"] < 0.5 for edit in edits)
    bases = load_file(out / "work/tuning.safetensors")["bases"]
    sites = load_directions(out).sites
    assert bases.shape[1:] == (len(sites) + 1, 2, 128, 1)  # and the embedding, which stays
    done = CliRunner().invoke(main, ["verify", str(out)])
    assert done.exit_code == 0, done.output
    assert "no shared subspace is promised to be absent" in done.output
    assert "adapter: verified" in done.output
    card = (out / "checkpoint/README.md").read_text()
    assert "W' = W - s U Vᵀ W" in card
    assert "Q Qᵀ" not in card
    weights = (out / "checkpoint/model.safetensors").read_bytes()
    bounded = load_recipe(RECIPE, overrides=[*overrides, "tuning.max_change=0.001"])
    with pytest.raises(DirectionError, match=r"tuning\.max_change.* Nothing was written"):
        pipeline.build(bounded, out, options=replace(FAST, force=True))
    assert (out / "checkpoint/model.safetensors").read_bytes() == weights
