"""Drawn answers: the same whatever the batches, and draws from the model's own distribution."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from abliterator.engines import Sampling
from abliterator.engines._generate import generate
from abliterator.engines._sampling import gumbel_noise, split_mix
from tests.helpers.tiny import VOCABULARY

BITS = (1 << 64) - 1
DRAWN = Sampling(temperature=1.5, seed=3)


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(4)
    lengths = torch.randint(2, 15, (13,), generator=generator).tolist()
    return [torch.randint(4, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def split_mix_by_hand(seed, n):
    """SplitMix64 with Python's integers, as its authors' C code has it."""
    state = seed
    for _ in range(n):
        state = (state + 0x9E3779B97F4A7C15) & BITS
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & BITS
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & BITS
        yield z ^ (z >> 31)


def test_published_outputs_of_split_mix():
    first = [bits & BITS for bits in split_mix(torch.tensor([1234567]), 0, 3)[0].tolist()]
    assert first == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.lists(st.integers(0, (1 << 63) - 1), min_size=1, max_size=3), st.integers(0, 9))
def test_any_part_of_any_sequence(seeds, start):
    rows = split_mix(torch.tensor(seeds), start, 4).tolist()
    assert [[bits & BITS for bits in row] for row in rows] == [
        list(split_mix_by_hand(seed, start + 4))[start:] for seed in seeds
    ]


def test_noise_is_gumbels_and_seeds_are_independent():
    noise = gumbel_noise(torch.tensor([0, 1, 2, 1 << 62]), 0, 20_000)
    assert all(stats.kstest(row.numpy(), stats.gumbel_r.cdf).pvalue > 1e-3 for row in noise)
    assert (torch.corrcoef(noise) - torch.eye(4)).abs().max() < 0.03


def drawn_by_hand(loaded, prompt, sampling, max_new_tokens, stops):
    """The oracle: the whole sequence through the model for every token, and noise from above."""
    ids, seed = list(prompt), torch.tensor([sampling.seed_of(prompt)])
    with torch.inference_mode():
        for step in range(max_new_tokens):
            logits = loaded.model(torch.tensor([ids]), use_cache=False).logits[0, -1].double()
            noise = gumbel_noise(seed, step * len(logits), len(logits))[0]
            token = int((logits / sampling.temperature + noise).argmax())
            if token in stops:
                break
            ids.append(token)
    return tuple(ids[len(prompt) :])


def test_answers_are_the_same_whatever_batch_order_and_interruption(tiny_loaded, prompts):
    loaded, options = tiny_loaded("llama"), {"max_new_tokens": 8, "sampling": DRAWN}
    stops = [generate(loaded, prompts[:1], batch_size=1, stop_ids=(), **options)[0].token_ids[3]]
    options["stop_ids"] = stops
    expected = [drawn_by_hand(loaded, prompt, DRAWN, 8, stops) for prompt in prompts]
    for batch_size in (1, 5, 13):
        answers = generate(loaded, prompts, batch_size=batch_size, **options)
        assert [answer.token_ids for answer in answers] == expected
    backwards = generate(loaded, prompts[::-1], batch_size=4, **options)
    assert [answer.token_ids for answer in backwards[::-1]] == expected
    kept = dict(list(enumerate(answers))[::2])
    resumed = generate(loaded, prompts, batch_size=4, answered=kept, **options)
    assert resumed == answers


def test_each_seed_sample_and_prompt_draws_anew(tiny_loaded, prompts):
    loaded, options = tiny_loaded("llama"), {"max_new_tokens": 8, "batch_size": 13, "stop_ids": ()}
    draws = [DRAWN, dataclasses.replace(DRAWN, seed=4), dataclasses.replace(DRAWN, sample=1)]
    answers = [generate(loaded, prompts, sampling=draw, **options) for draw in draws]
    greedy = generate(loaded, prompts, **options)
    for one, other in [(0, 1), (0, 2), (1, 2)]:
        assert sum(a == b for a, b in zip(answers[one], answers[other], strict=True)) < 3
    assert sum(a == b for a, b in zip(answers[0], greedy, strict=True)) < 3


def test_next_to_no_temperature_is_greedy(tiny_loaded, prompts):
    loaded, options = tiny_loaded("llama"), {"max_new_tokens": 8, "batch_size": 5, "stop_ids": ()}
    cold = generate(loaded, prompts, sampling=Sampling(temperature=1e-6), **options)
    assert cold == generate(loaded, prompts, **options)
    narrow = generate(loaded, prompts, sampling=Sampling(temperature=1.0, top_p=1e-9), **options)
    assert narrow == cold


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_first_tokens_are_draws_from_the_distribution(tiny_loaded, prompts, top_p):
    """4,000 draws of one token against the distribution, and against another temperature's."""
    loaded, prompt = tiny_loaded("llama"), prompts[0]
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([prompt])).logits[0, -1].double()
    seeds = torch.tensor([Sampling(0.7, sample=i).seed_of(prompt) for i in range(4000)])
    tokens = Sampling(0.7, top_p=top_p)._draw(logits.expand(4000, -1), seeds, 0)

    def statistic(temperature):
        shares = (logits / temperature).softmax(0)
        order = shares.argsort(descending=True)
        before = shares[order].cumsum(0) - shares[order]
        shares[order[before >= top_p]] = 0
        expected = 4000 * shares / shares.sum()
        often = expected >= 5
        seen = tokens.bincount(minlength=len(shares)).double()
        assert not seen[expected == 0].any()
        rest = (seen[~often].sum(), expected[~often].sum())
        cells = [*zip(seen[often], expected[often], strict=True), *([rest] if rest[1] else [])]
        chi = sum(float((s - e) ** 2 / e) for s, e in cells)
        return stats.chi2.sf(chi, len(cells) - 1)

    assert statistic(0.7) > 1e-3
    if top_p == 1:
        assert statistic(1.0) < 1e-6
