"""KL against torch's own, and distributions against whole forward passes."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abliterator.engines import AnswerPath, TransformersEngine
from abliterator.errors import GenerationError, OutputError
from abliterator.evaluation import (
    LogitFile,
    _paths,
    answer_path,
    base_paths,
    kl_divergence,
    measure_divergence,
    neutral_text,
    text_perplexity,
)
from abliterator.evaluation._kl import top1_agreement
from abliterator.model import load_model, render_chat
from tests.engines.seams import limit_logit_batches
from tests.helpers.tiny import VOCABULARY


def first_token_logprobs(loaded, prompts, *, max_batch_tokens):
    """[N, V] float32 log-probabilities of the first answer token, after each prompt."""
    paths = [AnswerPath(tuple(prompt), 1) for prompt in prompts]
    rows = dict(TransformersEngine(loaded).logits(paths, max_batch_tokens=max_batch_tokens))
    return torch.stack([rows[i][-1] for i in range(len(prompts))]).float().log_softmax(-1)


def written(loaded, paths, file, *, max_batch_tokens):
    """A file of a model's logits along `paths`."""
    logits = LogitFile(file)
    logits.write(paths, TransformersEngine(loaded).logits(paths, max_batch_tokens=max_batch_tokens))
    return logits


def compared(loaded, paths, file, *, max_batch_tokens):
    """A model against the logits that were written of another."""
    logits = TransformersEngine(loaded).logits(paths, max_batch_tokens=max_batch_tokens)
    return file.compare(paths, logits)


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


# ---- along the base's answers


@pytest.fixture(scope="module")
def paths(prompts):
    """Prompts of several lengths, with several numbers of compared positions."""
    return [
        answer_path(ids, ids[::-1], tokens=4, stopped=i % 2 == 0) for i, ids in enumerate(prompts)
    ]


def changed(loaded, change):
    model = copy.deepcopy(loaded.model)
    with torch.no_grad():
        change(model)
    return dataclasses.replace(loaded, model=model)


def flip(model):
    model.model.layers[0].mlp.down_proj.weight.mul_(-1)


def test_a_path_ends_before_the_last_token_that_is_predicted():
    assert answer_path([5, 6], [7, 8, 9], tokens=2, stopped=True) == AnswerPath((5, 6, 7), 2)
    assert answer_path([5, 6], [7, 8], tokens=9, stopped=True) == AnswerPath((5, 6, 7, 8), 3)
    assert answer_path([5, 6], [7, 8], tokens=2, stopped=False) == AnswerPath((5, 6, 7), 2)
    assert answer_path([5, 6], [], tokens=9, stopped=True) == AnswerPath((5, 6), 1)


@pytest.mark.parametrize("batch_bytes", [1, 1 << 20])
@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_every_position_is_what_whole_forward_passes_say(
    tiny_loaded, paths, tmp_path, monkeypatch, family, batch_bytes
):
    limit_logit_batches(monkeypatch, batch_bytes)
    base = tiny_loaded(family)
    layers = "model.layers.0.mlp.down_proj" if family == "llama" else "transformer.h.0.mlp.c_proj"
    edited = changed(base, lambda model: model.get_submodule(layers).weight.mul_(-1))
    file = written(base, paths, tmp_path / "base", max_batch_tokens=20)
    found = compared(edited, paths, file, max_batch_tokens=20)
    for path, divergence in zip(paths, found, strict=True):
        ids = torch.tensor([path.token_ids])
        before, after = (
            side.model(ids, use_cache=False).logits[0, -path.positions :].log_softmax(-1)
            for side in (base, edited)
        )
        torch.testing.assert_close(
            divergence.kl, kl_divergence(before, after), rtol=1e-3, atol=1e-6
        )
        assert torch.equal(divergence.top1, top1_agreement(before, after))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_against_itself_is_exactly_zero_along_its_answers(
    tiny_folder, paths, tmp_path, dtype
):
    loaded = load_model(tiny_folder("llama"), device="cpu", dtype=dtype)
    file = written(loaded, paths, tmp_path / "base", max_batch_tokens=64)
    found = compared(loaded, paths, file, max_batch_tokens=64)
    assert len(found) == len(paths)
    for path, divergence in zip(paths, found, strict=True):
        assert torch.equal(divergence.kl, torch.zeros(path.positions, dtype=torch.float64))
        assert divergence.top1.all()


def test_never_more_than_one_batch_of_logits_is_made(tiny_loaded, paths, tmp_path, monkeypatch):
    limit_logit_batches(monkeypatch, 2 * 4 * VOCABULARY * 4)  # two rows of 4 positions
    loaded = tiny_loaded("llama")
    seen = []
    handle = loaded.model.lm_head.register_forward_hook(lambda m, a, out: seen.append(out.numel()))
    written(loaded, paths, tmp_path / "base", max_batch_tokens=4096)
    handle.remove()
    assert max(seen) <= 2 * 4 * VOCABULARY


def test_models_that_cannot_be_compared(tiny_loaded, tiny_folder, paths, tmp_path, monkeypatch):
    file = written(tiny_loaded("llama"), paths, tmp_path / "base", max_batch_tokens=64)
    half = load_model(tiny_folder("llama"), device="cpu", dtype="bfloat16")
    with pytest.raises(GenerationError, match="other sizes"):
        compared(half, paths, file, max_batch_tokens=64)
    monkeypatch.setattr(_paths, "free_bytes", lambda folder: 1000)
    with pytest.raises(OutputError, match="GB free"):
        written(half, paths, tmp_path / "base", max_batch_tokens=64)


def test_the_measurement_as_a_whole(tiny_loaded, tmp_path):
    base = tiny_loaded("llama")
    sides = {"base": base, "edited": changed(base, flip)}

    def render(side):
        return [render_chat(side.tokenizer, text) for text in ("which river", "the old town?")]

    def measured(sides):
        scratch = tmp_path / "logits"
        engines = {side: TransformersEngine(loaded) for side, loaded in sides.items()}
        base = engines["base"]
        paths = base_paths(base, render(base), tokens=5, max_new_tokens=256, batch_size=2)
        found = measure_divergence(
            engines.__getitem__, render, paths, tokens=5, scratch=scratch, max_batch_tokens=64
        )
        assert not scratch.exists()
        return found

    same = measured({"base": base, "edited": base})
    assert (same.kl.value, same.kl_first_token.value, same.top1_agreement.value) == (0, 0, 1)
    assert same.perplexity_base == same.perplexity_edited
    found = measured(sides)
    assert found.kl.n == found.kl_first_token.n == found.top1_agreement.n == 2
    assert found.kl.value > 1e-3
    first = [first_token_logprobs(sides[side], render(base), max_batch_tokens=64) for side in sides]
    expected = kl_divergence(*first).mean().item()
    assert found.kl_first_token.value == pytest.approx(expected, rel=1e-3)
    other = dataclasses.replace(base, tokenizer=copy.deepcopy(base.tokenizer))
    other.tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(GenerationError, match="different tokens"):
        measured({"base": base, "edited": other})


# ---- perplexity


def test_perplexity_of_the_fixed_text(tiny_loaded):
    loaded = tiny_loaded("llama")
    passages = neutral_text()[:2]
    total = tokens = 0
    for passage in passages:
        whole = torch.tensor([loaded.tokenizer(passage)["input_ids"]])
        assert whole.shape[1] > loaded.model.config.max_position_embeddings
        for ids in whole.split(loaded.model.config.max_position_embeddings, dim=1):
            # transformers' own loss: the mean over all tokens but the first
            total += loaded.model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
    found = text_perplexity(TransformersEngine(loaded), passages)
    assert found.tokens == tokens
    assert found.value == pytest.approx(math.exp(total / tokens), rel=1e-4)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(tiny_loaded):
    blank = changed(tiny_loaded("llama"), lambda model: model.lm_head.weight.zero_())
    found = text_perplexity(TransformersEngine(blank), neutral_text()[:1])
    assert found.value == pytest.approx(VOCABULARY, rel=1e-5)


def test_the_fixed_text_is_long_enough_to_mean_something():
    passages = neutral_text()
    assert len(passages) == 8
    assert sum(len(passage.split()) for passage in passages) > 700


def test_no_text_is_an_error(tiny_loaded):
    with pytest.raises(GenerationError, match="no text"):
        text_perplexity(TransformersEngine(tiny_loaded("llama")), [""])
