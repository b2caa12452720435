"""KL against torch's own, and distributions against whole forward passes."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abliterator.divergence import first_token_logprobs, kl_divergence, top1_agreement
from abliterator.errors import GenerationError
from tests.tiny import VOCABULARY


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(2, 9, (17,), generator=generator).tolist()
    return [torch.randint(4, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("family", ["llama", "gemma", "phi3", "qwen"])
def test_rows_are_the_models_next_token_distributions(tiny_loaded, prompts, family):
    loaded = tiny_loaded(family)
    logprobs = first_token_logprobs(loaded, prompts, max_batch_tokens=20)
    assert (logprobs.shape, logprobs.dtype) == ((len(prompts), VOCABULARY), torch.float32)
    for row, ids in zip(logprobs, prompts, strict=True):
        logits = loaded.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(row, logits.log_softmax(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logprobs.exp().sum(1), torch.ones(len(prompts)))


def test_only_the_last_positions_logits_are_made(tiny_loaded, prompts):
    loaded = tiny_loaded("llama")
    seen = []
    handle = loaded.model.lm_head.register_forward_hook(lambda m, a, out: seen.append(out.shape))
    first_token_logprobs(loaded, prompts, max_batch_tokens=4096)
    handle.remove()
    assert {shape[1] for shape in seen} == {1}


def test_a_model_against_itself_is_exactly_zero(tiny_loaded, prompts):
    first, second = (
        first_token_logprobs(tiny_loaded("llama"), prompts, max_batch_tokens=64) for _ in range(2)
    )
    assert torch.equal(kl_divergence(first, second), torch.zeros(len(prompts), dtype=torch.float64))
    assert top1_agreement(first, second).all()


def test_a_changed_model_is_not(tiny_loaded, prompts):
    loaded = tiny_loaded("llama")
    changed = copy.deepcopy(loaded.model)
    changed.model.layers[0].mlp.down_proj.weight.data.mul_(-1)
    base = first_token_logprobs(loaded, prompts, max_batch_tokens=64)
    edited = first_token_logprobs(
        dataclasses.replace(loaded, model=changed), prompts, max_batch_tokens=64
    )
    kl = kl_divergence(base, edited)
    assert kl.dtype == torch.float64
    assert (kl > 1e-3).all()
    assert not top1_agreement(base, edited).all()


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(2, 300), st.floats(0.1, 20))
def test_kl_is_torchs_kl(seed, n, vocabulary, spread):
    generator = torch.Generator().manual_seed(seed)
    base, edited = (
        (spread * torch.randn(2, n, vocabulary, generator=generator, dtype=torch.float64))
        .log_softmax(-1)
        .unbind()
    )
    oracle = torch.nn.functional.kl_div(edited, base, reduction="none", log_target=True).sum(1)
    kl = kl_divergence(base, edited)
    torch.testing.assert_close(kl, oracle)
    assert (kl >= -1e-12).all()


def test_kl_has_a_direction_and_known_values():
    base = torch.tensor([[0.5, 0.5, 0.0]]).log()
    edited = torch.tensor([[0.25, 0.5, 0.25]]).log()
    assert kl_divergence(base, edited).item() == pytest.approx(0.5 * math.log(2))
    assert kl_divergence(edited, base).item() == math.inf


def test_top1():
    base = torch.tensor([[0.1, 0.9], [0.6, 0.4]]).log()
    edited = torch.tensor([[0.4, 0.6], [0.2, 0.8]]).log()
    assert top1_agreement(base, edited).tolist() == [True, False]


@pytest.mark.parametrize("prompts", [[], [[5], []]])
def test_nothing_to_compare(tiny_loaded, prompts):
    with pytest.raises(GenerationError, match="no prompts"):
        first_token_logprobs(tiny_loaded("llama"), prompts, max_batch_tokens=64)


def test_nan_is_an_error(tiny_loaded, prompts):
    loaded = tiny_loaded("llama")
    damaged = copy.deepcopy(loaded.model)
    damaged.lm_head.weight.data[3, 3] = float("nan")
    with pytest.raises(GenerationError, match="NaN"):
        first_token_logprobs(
            dataclasses.replace(loaded, model=damaged), prompts, max_batch_tokens=64
        )
