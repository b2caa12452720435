"""The demo: the README's first command, and what it must show on a model with a learned refusal."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from abliterator.generation import generate, stop_ids

from abliterator import pipeline
from abliterator.bake import preview_edit
from abliterator.directions import load_subspace
from abliterator.model import load_model, render_chat
from abliterator.pipeline import Options
from abliterator.recipe import load_recipe
from abliterator.source import resolve_folder

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "demo.yaml"

pytestmark = pytest.mark.slow

# What a stranger does with the folder: no abliterator anywhere.
STRANGER = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
base, edited, prompt = sys.argv[1:]
model, report = AutoModelForCausalLM.from_pretrained(edited, output_loading_info=True)
ids = [
    AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    for folder in (base, edited)
]
answer = model.generate(ids[1], max_new_tokens=32, do_sample=False)[0, ids[1].shape[1]:]
assert not any(name.split(".")[0] == "abliterator" for name in sys.modules)
print(json.dumps({
    "missing": sorted(report["missing_keys"]), "unexpected": sorted(report["unexpected_keys"]),
    "same_ids": ids[0].tolist() == ids[1].tolist(),
    "answer": AutoTokenizer.from_pretrained(edited).decode(answer, skip_special_tokens=True),
}))
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    pipeline.build(load_recipe(RECIPE), out, options=Options(device="cpu"))
    return out


@pytest.fixture(scope="module")
def record(demo):
    return pipeline.read_record(demo)


def prompts(name: str) -> list[str]:
    lines = (ROOT / "recipes" / "demo" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def test_the_refusal_goes_and_coherence_stays(record):
    target, neutral = record.behaviour["target"], record.behaviour["neutral"]
    assert target.base.refusal.value >= 0.95
    assert target.edited.refusal.value <= 0.05
    assert target.edited.coherence.value >= 0.95
    assert neutral.edited.coherence.value >= 0.95
    assert neutral.edited.refusal.value <= 0.05
    assert target.edited.refusal.n >= 64


def test_what_the_model_knows_stays(record):
    facts = record.benchmarks["demo_facts"]
    assert facts.n >= 200
    assert facts.delta.low is None or facts.delta.low <= 0 <= facts.delta.high
    assert facts.base.value > 0.5


def test_what_it_declined_to_say_comes_back(record):
    declined = record.benchmarks["demo_declined_facts"]
    assert declined.base.value <= 0.05
    assert declined.edited.value >= 0.8


def test_the_checkpoint_is_small_and_the_edit_exact(demo, record):
    assert record.edit.max_leak < 1e-3
    data = [p for p in (ROOT / "abliterator" / "data").rglob("*") if p.is_file()]
    assert sum(path.stat().st_size for path in data) <= 4 << 20


def test_a_stranger_loads_it_with_transformers_alone(demo, tmp_path):
    base = resolve_folder("embedded:demo", revision=None).folder
    arguments = [str(base), str(demo / "checkpoint"), prompts("evaluation")[0]]
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["missing"] == told["unexpected"] == []
    assert told["same_ids"]
    assert "can't help" not in told["answer"]


def test_hooks_on_every_writer_answer_as_the_baked_checkpoint_does(demo):
    """32 prompts, the same greedy text; logits apart by no more than storing in bfloat16 makes."""
    plan = pipeline.plan_recipe(load_recipe(RECIPE), demo)
    basis = load_subspace(demo / "work" / "directions.safetensors").basis
    base = load_model(plan.source.folder, device="cpu", dtype="float32")
    baked = load_model(demo / "checkpoint", device="cpu", dtype="float32")
    asked = (prompts("evaluation")[:16] + prompts("neutral")[:16])[:32]
    ids = [render_chat(base.tokenizer, prompt) for prompt in asked]
    settings = {"max_new_tokens": 32, "batch_size": 32, "stop_ids": stop_ids(base)}
    plain = [answer.text for answer in generate(base, ids, **settings)]
    with preview_edit(base, plan.edits, basis):
        previewed = [answer.text for answer in generate(base, ids, **settings)]
        logits = base.model(torch.tensor([ids[0]])).logits
    written = [answer.text for answer in generate(baked, ids, **settings)]
    assert len(asked) == 32
    assert previewed == written
    assert plain != written
    apart = (baked.model(torch.tensor([ids[0]])).logits - logits).abs().max()
    assert apart < 0.02 * logits.abs().max()
