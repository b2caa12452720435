"""A tiny model with prompts, as the studies measure it, and a recipe of it."""

import pytest

from abliterator.anatomy import anatomy_of
from abliterator.bake import plan_edits
from abliterator.checkpoint import Checkpoint
from abliterator.engines import TransformersEngine
from abliterator.evaluation import EvaluationContext, RenderedPrompts
from abliterator.judge import RuleJudge
from abliterator.model import render_chat
from abliterator.recipe import Edit

PROMPTS = [f"Where is the {x} of the town?" for x in "abcdefgh"]


@pytest.fixture
def context(tiny_loaded):
    loaded = tiny_loaded()
    checkpoint = Checkpoint.open(loaded.folder)
    rendered = RenderedPrompts(
        PROMPTS, [render_chat(loaded.tokenizer, prompt) for prompt in PROMPTS]
    )
    return EvaluationContext(
        engine=TransformersEngine(loaded),
        plan=plan_edits(checkpoint, anatomy_of(checkpoint.config), Edit()),
        target=rendered,
        neutral=rendered,
        judge=RuleJudge(),
        max_new_tokens=80,
        kl_tokens=3,
        batch_size=8,
        max_batch_tokens=512,
    )


@pytest.fixture
def recipe(tmp_path, tiny_folder):
    sets = {"target": "Where", "contrast": "When", "neutral": "What", "evaluation": "Who"}
    for name, word in sets.items():
        lines = "\n".join(f"{word} is the {x}?" for x in "abcdefghijklmnop")
        (tmp_path / f"{name}.txt").write_text(lines)
    path = tmp_path / "tiny.yaml"
    sources = ", ".join(f"{name}: {{path: {name}.txt}}" for name in sets)
    path.write_text(
        f"model: {tiny_folder()}\nlayers: [2, 1]\nk: 1\nprompts: {{{sources}}}\n"
        "rollouts: {max_new_tokens: 80}\ndivergence: {tokens: 3}\n"
    )
    return path
