"""A tiny model as the subject of a selection, and the script that stands in for its answers."""

import pytest
import torch
from abliterator.selection._rows import unedited

from abliterator.selection import _grow, _race, _scores, _sweep, judge_edits, refusal_scores
from tests.selection.scripted import PROMPTS, said
from tests.selection.subjects import subject_of


@pytest.fixture
def subject(tiny_loaded):
    return subject_of(tiny_loaded(), PROMPTS, max_new_tokens=4, max_batch_tokens=64)


@pytest.fixture
def base(subject):
    """A baseline of a model that has no refusals to learn from."""
    forced = [(3, 4, 5), (6,), ()]
    return _scores.Baseline(
        openings=((11,),),
        judged=judge_edits(subject, [torch.zeros(32, 1, dtype=torch.float64)])[0],
        target_score=0.0,
        contrast_score=float(
            refusal_scores(subject.loaded, PROMPTS, [(11,)], max_batch_tokens=64).mean()
        ),
        forced=forced,
        logprobs=[logprobs for *_, logprobs in sorted(unedited(subject).along(forced))],
        tokens=0,
    )


@pytest.fixture
def scripted(monkeypatch):
    """`scripted(scores, products)`: what a sweep sees of layers 1, 2, ... and of stacks by rank."""

    def script(scores, products):
        def judge(subject, bases, prompts=None):
            # the layer's direction is the unit vector of its index
            found = [
                products(tuple((basis.abs().argmax(dim=0) + 1).tolist()), basis.shape[1])
                for basis in bases
            ]
            return [said(one if prompts is None else [one[i] for i in prompts]) for one in found]

        for room in (_race, _grow):
            monkeypatch.setattr(room, "judge_edits", judge)
        monkeypatch.setattr(_sweep, "score", lambda *_: scores)
        monkeypatch.setattr(_grow, "mean_kl", lambda edited, _: [0.01] * edited.n)

    return script
