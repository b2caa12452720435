"""A trained model whose norms come after its sublayers: the edit must go through their gains.

tests/models/gemma is made by scripts/demo/make_gemma.py: of Gemma 3's shape, it declines cooking.
Baked in float32 here, so that hooks and weights can be held against each other without what storing
in bfloat16 changes.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from abliterator import pipeline
from abliterator.bake import bake, preview_edit
from abliterator.directions import load_subspace
from abliterator.engines import TransformersEngine
from abliterator.judge import RuleJudge
from abliterator.model import load_model, render_chat
from abliterator.pipeline import Options
from abliterator.recipe import load_recipe
from tests.helpers.leak import leak_meter

ROOT = Path(__file__).parents[2]
PROMPTS = ROOT / "recipes" / "demo"
TOKENIZER = ROOT / "abliterator" / "data" / "demo" / "model"


@pytest.fixture(scope="module")
def organism(tmp_path_factory):
    """The folder of the model in float32, with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("gemma") / "base"
    shutil.copytree(ROOT / "tests" / "models" / "gemma", folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOKENIZER / name, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    weights = {n: t.float() for n, t in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def built(organism, tmp_path_factory):
    """OUT of the demo's recipe on this model, up to the baked checkpoint, and its plan."""
    out = tmp_path_factory.mktemp("gemma-out") / "out"
    overrides = [f"model={organism}", "layers=[3]", "benchmarks.tasks=[]"]
    recipe = load_recipe(PROMPTS.parent / "demo.yaml", overrides=overrides)
    pipeline.run_stages(recipe, out, until="bake", options=Options(device="cpu", dtype="float32"))
    return out, pipeline.plan_recipe(recipe, out)


def prompts(name: str) -> list[str]:
    return [json.loads(s)["prompt"] for s in (PROMPTS / f"{name}.jsonl").read_text().splitlines()]


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


def test_the_behaviour_goes_and_hooks_agree_with_weights(organism, built):
    out, plan = built
    basis = load_subspace(out / "work" / "directions.safetensors").basis
    base = load_model(organism, device="cpu", dtype="float32")
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


def test_without_the_gains_they_do_not_agree_and_the_direction_stays(organism, built, tmp_path):
    out, plan = built
    basis = load_subspace(out / "work" / "directions.safetensors").basis
    base = load_model(organism, device="cpu", dtype="float32")
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
