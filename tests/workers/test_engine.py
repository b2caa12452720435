"""An engine on workers against one in this process: everything equal, bit by bit."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from abliterator.anatomy import anatomy_of
from abliterator.bake import plan_edits
from abliterator.capture import capture
from abliterator.checkpoint import Checkpoint
from abliterator.engines import (
    AnswerPath,
    DistributedEngine,
    ModelFolder,
    Sampling,
    Steering,
    StreamEdit,
    TransformersEngine,
    WriterEdit,
)
from abliterator.errors import CheckpointError, GenerationError, PromptError
from abliterator.model import load_model, render_chat
from abliterator.recipe import Edit
from abliterator.source import resolve_folder
from abliterator.subspace import orthonormal_basis
from abliterator.workers import PoolSettings, open_pool

WORDS = ["planet", "star", "moon", "river", "bread", "garden", "music", "paper", "stone", "cloud"]
CONTINUATIONS = [(5, 6, 7), (9,)]


@pytest.fixture(scope="module")
def folder():
    return resolve_folder("embedded:demo", revision=None).folder


@pytest.fixture(scope="module")
def local(folder):
    return TransformersEngine(load_model(folder, device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def pool():
    with open_pool(PoolSettings(workers=2, device="cpu")) as pool:
        yield pool


@pytest.fixture(scope="module")
def distributed(folder, pool):
    return DistributedEngine(pool, ModelFolder.of(folder, "float32"))


@pytest.fixture(scope="module")
def prompts(local):
    texts = [f"Tell me about {w} and {' '.join(WORDS[: i % 5])}." for i, w in enumerate(WORDS * 2)]
    return [render_chat(local.tokenizer, text) for text in texts]


@pytest.fixture(scope="module")
def edits(folder, local):
    checkpoint, (n_layers, d_model) = Checkpoint.open(folder), local.hidden_shape
    plan = plan_edits(checkpoint, anatomy_of(checkpoint.config), Edit())
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(4, 2, d_model, generator=generator, dtype=torch.float64)
    bases = [orthonormal_basis(vectors) for vectors in drawn]
    return {
        "writers": [WriterEdit(plan, basis) for basis in bases],
        "stream": [StreamEdit(bases[0], 0.5)],
        "steering": [Steering(1 + i % n_layers, basis[:, 0]) for i, basis in enumerate(bases)],
    }


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_facts(local, distributed):
    for name in ("limits", "stop_ids", "hidden_shape"):
        assert getattr(distributed, name) == getattr(local, name)


@pytest.mark.parametrize("n_lengths", [3, 20])
def test_capture(local, distributed, prompts, n_lengths):
    counts = []
    prompts = [prompts[i % n_lengths] for i in range(20)]
    moments = [
        capture(engine, prompts, max_batch_tokens=128, on_batch=counts.append)
        for engine in (local, distributed)
    ]
    assert same(*([m.n, m.mean, m.m2] for m in moments))
    assert counts[: len(counts) // 2] == counts[len(counts) // 2 :]


@pytest.mark.parametrize("kind", [None, "writers", "stream", "steering"])
def test_answers_and_distributions_under_an_edit(local, distributed, prompts, edits, kind):
    def measured(engine):
        with engine.edited(edits[kind][0]) if kind else nullcontext():
            answers = engine.answers(prompts, max_new_tokens=6, batch_size=4, share_prefix=True)
            paths = [
                AnswerPath((*prompt, *answer.token_ids[:2]), 2)
                for prompt, answer in zip(prompts, answers, strict=True)
            ]
            logits = list(engine.logits(paths, max_batch_tokens=256, share_prefix=True))
            likelihoods = engine.log_likelihoods(prompts, CONTINUATIONS, max_batch_tokens=256)
        return answers, logits, likelihoods

    assert same(measured(local), measured(distributed))


def test_drawn_answers_do_not_depend_on_the_number_of_workers(local, distributed, prompts):
    options = {"max_new_tokens": 6, "batch_size": 4, "sampling": Sampling(1.5, seed=2)}
    drawn = local.answers(prompts, **options)
    assert same(drawn, distributed.answers(prompts, **options))
    assert not same(drawn, local.answers(prompts, max_new_tokens=6, batch_size=4))


@pytest.mark.parametrize("kind", ["writers", "steering"])
def test_edits_side_by_side(local, distributed, prompts, edits, kind):
    paths = [AnswerPath(tuple(prompt), 2) for prompt in prompts]

    def measured(engine):
        with engine.edited_side_by_side(edits[kind], max_batch_tokens=64) as edited:
            answers = edited.answers(prompts, max_new_tokens=4, batch_size=16)
            likelihoods = edited.log_likelihoods(prompts, CONTINUATIONS)
            return edited.n, answers, list(edited.logits(paths)), likelihoods

    assert same(measured(local), measured(distributed))


def test_errors_are_those_of_the_local_engine(distributed, edits):
    with pytest.raises(GenerationError, match="Prompt 1 has no tokens"):
        distributed.answers([[5], []], max_new_tokens=2, batch_size=2)
    with pytest.raises(PromptError):
        list(distributed.hidden_states([[5] * 5000]))
    mixed = [edits["writers"][0], edits["steering"][0]]
    with (
        pytest.raises(GenerationError, match="side by side"),
        distributed.edited_side_by_side(mixed, max_batch_tokens=64),
    ):
        pass


def test_a_machine_that_sees_another_model(pool, folder, tmp_path):
    model = ModelFolder.of(folder, "float32")
    other = ModelFolder(folder, "float32", digest="another")
    with pytest.raises(CheckpointError, match="another model than on the machine"):
        _ = DistributedEngine(pool, other).limits
    gone = ModelFolder(tmp_path / "gone", "float32", digest=model.digest)
    with pytest.raises(CheckpointError, match="has no model, seen from a worker"):
        _ = DistributedEngine(pool, gone).limits
