"""A tuning context of a tiny model, and pairs that it learns from."""

from dataclasses import replace

import torch

from abliterator.anatomy import anatomy_of
from abliterator.bake import plan_edits
from abliterator.checkpoint import Checkpoint
from abliterator.engines import TransformersEngine
from abliterator.evaluation import EvaluationContext, RenderedPrompts
from abliterator.judge import RuleJudge
from abliterator.recipe import Edit, Tuning
from abliterator.subspace import orthonormal_basis
from abliterator.tuning import TuningContext
from abliterator.tuning._types import PreferencePair, PreferencePairs, Row
from tests.helpers import architectures

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
        plan=plan_edits(checkpoint, anatomy_of(checkpoint.config), Edit()),
        target=nothing,
        neutral=nothing,
        judge=RuleJudge(),
        max_new_tokens=8,
        kl_tokens=12,
        batch_size=4,
    )
    return TuningContext(evaluation, loaded, nothing, nothing, Tuning(**config))


def tiny_of(name, tiny_loaded, tmp_path):
    """A tiny model of that architecture."""
    folder = architectures.save(name, tmp_path / name)
    model = type(architectures.build(name)).from_pretrained(folder).eval()
    return replace(tiny_loaded(), model=model, folder=folder)


def with_config(context, **config):
    return replace(context, config=Tuning(**config))


def pairs_of(*rejected):
    pairs = [PreferencePair(i, r.prompt, r.answer, (3, 4), rejected) for i, r in enumerate(ROWS)]
    return PreferencePairs(tuple(pairs), ROWS)


def hooks_of(model):
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


def no_step(name):
    """Nobody hears of steps."""
