"""A trained model whose norms come after its sublayers: the edit must go through their gains.

tests/models/gemma is made by scripts/demo/make_gemma.py: of Gemma 3's shape, it declines cooking.
Baked in float32 here, so that hooks and weights can be held against each other without what storing
in bfloat16 changes.
"""

from dataclasses import replace

import pytest
import torch

from abliterator import pipeline
from abliterator.bake import bake, preview_edit
from abliterator.directions import load_subspace
from abliterator.engines import TransformersEngine
from abliterator.judge import RuleJudge
from abliterator.model import load_model, render_chat
from abliterator.pipeline import Options
from abliterator.recipe import load_recipe
from tests.helpers.leak import leak_meter
from tests.helpers.organisms import PROMPTS, organism, prompts


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """The folder of the model in float32, with the demo's tokenizer."""
    return organism("gemma", tmp_path_factory.mktemp("gemma") / "base")


@pytest.fixture(scope="module")
def built(base_folder, tmp_path_factory):
    """OUT of the demo's recipe on this model, up to the baked checkpoint, and its plan."""
    out = tmp_path_factory.mktemp("gemma-out") / "out"
    overrides = [f"model={base_folder}", "layers=[3]", "benchmarks.tasks=[]"]
    recipe = load_recipe(PROMPTS.parent / "demo.yaml", overrides=overrides)
    pipeline.run_stages(recipe, out, until="bake", options=Options(device="cpu", dtype="float32"))
    return out, pipeline.plan_recipe(recipe, out)


def answers(loaded, asked: list[str]) -> list[str]:
    ids = [render_chat(loaded.tokenizer, prompt) for prompt in asked]
    found = TransformersEngine(loaded).answers(ids, max_new_tokens=32, batch_size=32)
    return [answer.text for answer in found]


def judged(asked: list[str], texts: list[str]) -> tuple[float, float]:
    """Share refused, and mean coherence."""
    judge = RuleJudge()
    verdicts = [judge.judge(p, t, finish_reason="stop") for p, t in zip(asked, texts, strict=True)]
    refused = sum(bool(v.refused) for v in verdicts) / len(verdicts)
    return refused, sum(v.coherence for v in verdicts) / len(verdicts)


def leaks(loaded, basis) -> list[float]:
    ids = render_chat(loaded.tokenizer, prompts("evaluation")[0])
    return leak_meter(loaded.model, basis, torch.tensor([ids]))


def test_the_behaviour_goes_and_hooks_agree_with_weights(base_folder, built):
    out, plan = built
    basis = load_subspace(out / "work" / "directions.safetensors").basis
    base = load_model(base_folder, device="cpu", dtype="float32")
    baked = load_model(out / "checkpoint", device="cpu", dtype="float32")
    asked = prompts("evaluation")
    before, written = answers(base, asked), answers(baked, asked)
    assert judged(asked, before)[0] >= 0.95
    refused, coherence = judged(asked, written)
    assert refused <= 0.05
    assert coherence >= 0.95

    assert min(leaks(base, basis)) > 0.01
    assert max(leaks(baked, basis)) < 1e-5
    both = asked[:16] + prompts("neutral")[:16]
    with preview_edit(base, plan.edits, basis):
        assert answers(base, both) == answers(baked, both)
        assert max(leaks(base, basis)) < 1e-5


def test_without_the_gains_they_do_not_agree_and_the_direction_stays(base_folder, built, tmp_path):
    out, plan = built
    basis = load_subspace(out / "work" / "directions.safetensors").basis
    base = load_model(base_folder, device="cpu", dtype="float32")
    assert all(edit.writer.gains for edit in plan.edits.edits)
    edits = (replace(e, writer=replace(e.writer, gains=())) for e in plan.edits.edits)
    plain = replace(plan.edits, edits=tuple(edits))
    bake(plan.checkpoint, plain, basis, tmp_path / "plain")
    baked = load_model(tmp_path / "plain", device="cpu", dtype="float32")
    assert min(leaks(baked, basis)) > 0.01
    with preview_edit(base, plan.edits, basis):
        ids = torch.tensor([render_chat(base.tokenizer, prompts("evaluation")[0])])
        apart = (base.model(ids).logits - baked.model(ids).logits).abs().max()
    assert apart > 0.1
