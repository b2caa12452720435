"""A tiny model as the subject of a selection, and the script that stands in for its answers."""

import pytest
import torch

from abliterator.engines import AnswerPath
from abliterator.selection import _grow, _race, _scores, _sweep, judge_edits, log_odds
from tests.selection.contexts import context_of, scoring_of, unedited
from tests.selection.scripted import PROMPTS, said


@pytest.fixture
def context(tiny_loaded):
    return context_of(tiny_loaded(), PROMPTS, max_new_tokens=4, max_batch_tokens=64)


@pytest.fixture
def base(context):
    """A baseline of a model that has no refusals to learn from."""
    forced = [(3, 4, 5), (6,), ()]
    paths = [
        AnswerPath((*prompt, *answer), len(answer) + 1)
        for prompt, answer in zip(PROMPTS, forced, strict=True)
    ]
    likelihoods = context.engine.log_likelihoods(PROMPTS, [(11,)], max_batch_tokens=64)
    return _scores.Baseline(
        openings=((11,),),
        judged=judge_edits(context, [torch.zeros(32, 1, dtype=torch.float64)])[0],
        scoring=scoring_of(context),
        target_score=0.0,
        contrast_score=float(log_odds(likelihoods).mean()),
        paths=paths,
        logits=[logits for _, _, logits in sorted(unedited(context).logits(paths))],
        tokens=0,
    )


@pytest.fixture
def scripted(monkeypatch):
    """`scripted(scores, products)`: what a sweep sees of layers 1, 2, ... and of stacks by rank."""

    def script(scores, products):
        def judge(context, bases, prompts=None):
            # the layer's direction is the unit vector of its index
            found = [
                products(tuple((basis.abs().argmax(dim=0) + 1).tolist()), basis.shape[1])
                for basis in bases
            ]
            return [said(one if prompts is None else [one[i] for i in prompts]) for one in found]

        for module in (_race, _grow):
            monkeypatch.setattr(module, "judge_edits", judge)
        monkeypatch.setattr(_sweep, "score", lambda *_: scores)
        monkeypatch.setattr(_grow, "mean_kl", lambda edited, _: [0.01] * edited.n)

    return script
