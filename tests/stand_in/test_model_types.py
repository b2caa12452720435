"""Every model type of the table on the stand-in accelerator: the CPU's figures, bit for bit.

Of each tiny model: the captured means, greedy answers, log-probabilities of the base, under the
previewed edit and under an intervention, and one step of descent on the edit's directions.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from abliterator.bake import preview_edit
from abliterator.capture import capture
from abliterator.engines import AnswerPath, StreamEdit, TransformersEngine, WriterEdit
from abliterator.evaluation import kl_terms
from abliterator.model import LoadedModel
from tests.anatomy.test_architectures import NAMES, basis, planned, tokens, vanilla
from tests.helpers import stand_in
from tests.helpers.architectures import image, save
from tests.helpers.stand_in import accelerator

pytestmark = [
    pytest.mark.slow,  # all together
    pytest.mark.skipif(not stand_in.available(), reason="torch has no backend in Python"),
]

PROMPTS = tokens().tolist()

# What a tiny model does not do on the CPU either.
NOT_ON_THE_CPU = {
    ("qwen2_5_omni_thinker", "answers"): "its config lacks the tokens that `generate` reads",
    ("xlstm", "answers"): "transformers' cached state is of another shape than its step expects",
    ("qwen3_omni_moe_thinker", "answers"): "its config lacks the tokens that `generate` reads",
}


def logits(engine, edit=None):
    paths = [AnswerPath(tuple(prompt), 5) for prompt in PROMPTS]
    if edit is None:
        return torch.cat([row for _, row in engine.logits(paths, max_batch_tokens=64)])
    with engine.edited(edit):
        return logits(engine)


def step(loaded, plan, name):
    """The directions after one step of descent on KL(base || edited)."""
    columns = torch.nn.Parameter(basis().to(loaded.device, torch.float32))
    optimiser = torch.optim.Adam([columns], lr=0.1)
    ids = tokens()[:1].to(loaded.device)
    seen = {key: value.to(loaded.device) for key, value in image(name, 1).items()}
    run = partial(loaded.model, ids, use_cache=False, **seen)
    with torch.no_grad():
        base = run().logits.log_softmax(-1)
    with preview_edit(loaded, plan, columns):
        kl_terms(base, run().logits.log_softmax(-1)).sum().backward()
    optimiser.step()
    return columns.detach().cpu()


QUESTIONS = {
    "capture": lambda loaded, plan, name: capture(TransformersEngine(loaded), PROMPTS).mean,
    "answers": lambda loaded, plan, name: [
        answer.token_ids
        for answer in TransformersEngine(loaded).answers(
            PROMPTS, max_new_tokens=2, batch_size=3, stop_ids=()
        )
    ],
    "base": lambda loaded, plan, name: logits(TransformersEngine(loaded)),
    "preview": lambda loaded, plan, name: logits(
        TransformersEngine(loaded), WriterEdit(plan, basis())
    ),
    "intervention": lambda loaded, plan, name: logits(
        TransformersEngine(loaded), StreamEdit(basis(), 0.7)
    ),
    "step": step,
}


@pytest.mark.parametrize("name", NAMES)
def test_figures_are_the_cpus(name, tmp_path, tiny_tokenizer):
    _, plan = planned(save(name, tmp_path))
    model = vanilla(tmp_path).requires_grad_(False)
    questions = {q: f for q, f in QUESTIONS.items() if (name, q) not in NOT_ON_THE_CPU}

    def figures(model, device):
        loaded = LoadedModel(model, tiny_tokenizer, tmp_path, device)
        return {question: ask(loaded, plan, name) for question, ask in questions.items()}

    with sdpa_kernel(SDPBackend.MATH):
        expected = figures(deepcopy(model), "cpu")
        with accelerator():
            results = figures(model.to("fake"), "fake")
    assert results.pop("answers", None) == expected.pop("answers", None)
    assert [q for q in expected if not torch.equal(results[q], expected[q])] == []
    assert not torch.equal(expected["preview"], expected["base"])
    assert not torch.equal(expected["step"], basis().float())
