"""A trained model whose blocks mix several streams: sublayers' output is edited, in every stream.

tests/models/streams is made by scripts/demo/make_streams.py: of DeepSeek V4's shape, it declines
cooking. Directions are taken where sublayers hand their output to the mixing. perf/stream_sites.py
compares the sites at which they can be removed.
"""

import pytest
import torch

from abliterator import pipeline
from abliterator.bake import preview_edit
from abliterator.directions import load_subspace
from abliterator.engines import StreamEdit, TransformersEngine
from abliterator.judge import RuleJudge
from abliterator.model import load_model, render_chat
from abliterator.pipeline import Options
from abliterator.recipe import load_recipe
from tests.helpers.organisms import PROMPTS, organism, prompts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The base in float32, its checkpoint without one direction, the plan, and the subspace."""
    base, out = (
        organism("streams", tmp_path_factory.mktemp("s") / "base"),
        tmp_path_factory.mktemp("o"),
    )
    overrides = [f"model={base}", "layers=[4]", "benchmarks.tasks=[]"]
    recipe = load_recipe(PROMPTS.parent / "demo.yaml", overrides=overrides)
    pipeline.run_stages(recipe, out, until="bake", options=Options(device="cpu", dtype="float32"))
    basis = load_subspace(out / "work" / "directions.safetensors").basis
    folders = [load_model(f, device="cpu", dtype="float32") for f in (base, out / "checkpoint")]
    return *folders, pipeline.plan_recipe(recipe, out), basis


def answers(loaded, asked):
    ids = [render_chat(loaded.tokenizer, prompt) for prompt in asked]
    given = TransformersEngine(loaded).answers(ids, max_new_tokens=32, batch_size=32)
    return [answer.text for answer in given]


def declined(asked, texts):
    judge = RuleJudge()
    verdicts = [judge.judge(p, t, finish_reason="stop") for p, t in zip(asked, texts, strict=True)]
    return sum(bool(v.refused) for v in verdicts) / len(verdicts)


def share_in_streams(loaded, basis):
    """The largest share of any stream in the subspace after each block, over all tokens."""
    shares, blocks = [], loaded.model.model.layers
    handles = [
        block.register_forward_hook(lambda _module, _inputs, output: shares.append(output.double()))
        for block in blocks
    ]
    with torch.inference_mode():
        loaded.model(torch.tensor([render_chat(loaded.tokenizer, prompts("evaluation")[0])]))
    for handle in handles:
        handle.remove()
    return [float(((s @ basis).norm(dim=-1) / s.norm(dim=-1)).max()) for s in shares]


def test_the_behaviour_goes_at_every_site_and_hooks_agree_with_weights(built):
    base, baked, plan, basis = built
    asked = prompts("evaluation")
    written = answers(baked, asked)
    assert declined(asked, answers(base, asked)) >= 0.95
    assert declined(asked, written) <= 0.2
    both = asked[:16] + prompts("neutral")[:16]
    with preview_edit(base, plan.edits, basis):
        assert answers(base, both) == answers(baked, both)
    with TransformersEngine(base).edited(StreamEdit(basis, alpha=1.0)):
        assert declined(asked, answers(base, asked)) <= 0.2


def test_streams_keep_what_the_embeddings_put_there_unless_blocks_are_hooked(built):
    base, baked, _, basis = built
    assert min(share_in_streams(baked, basis)) > 0.01
    with TransformersEngine(base).edited(StreamEdit(basis, alpha=1.0)):
        assert max(share_in_streams(base, basis)) < 1e-5
