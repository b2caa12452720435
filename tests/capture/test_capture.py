"""Moments against transformers' own hidden states, one prompt at a time."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from abliterator.capture import capture, capture_vectors, load_moments, save_moments
from abliterator.engines import TransformersEngine
from abliterator.errors import DirectionError
from abliterator.model import block_paths
from tests.helpers.tiny import D_MODEL, N_LAYERS, VOCABULARY


@pytest.fixture(scope="module")
def prompts():
    """Forty prompts of 3 to 12 tokens, many of one length."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(3, 13, (40,), generator=generator).tolist()
    return [torch.randint(4, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def one_by_one(loaded, prompts, position=-1):
    """[N, L + 1, H] float64 of `output_hidden_states`, the last one after the final norm."""
    rows = []
    with torch.inference_mode():
        for ids in prompts:
            states = loaded.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
            rows.append(torch.stack([state[0, position] for state in states]))
    return torch.stack(rows).double()


def worst_cosine_gap(a, b):
    """max |1 - cos| over the rows of two [L, H]."""
    return float((1 - torch.cosine_similarity(a, b, dim=1)).abs().max())


@pytest.mark.parametrize("family", ["llama", "gemma", "phi3", "qwen3"])
def test_rows_are_the_outputs_of_blocks(tiny_loaded, prompts, family):
    loaded = tiny_loaded(family)
    for ids in prompts[:3]:
        moments = capture(TransformersEngine(loaded), [ids])
        expected = one_by_one(loaded, [ids])[0]
        assert torch.equal(moments.mean[:-1], expected[1:-1])
        # The last row is taken before the final norm, where transformers' is after it.
        assert worst_cosine_gap(moments.mean[-1:], expected[-1:]) > 1e-3
        normed = loaded.model.model.norm(moments.mean[-1].float())
        torch.testing.assert_close(normed.double(), expected[-1])


def test_mean_and_spread(tiny_loaded, prompts):
    loaded = tiny_loaded("llama")
    moments = capture(TransformersEngine(loaded), prompts, max_batch_tokens=50)
    rows = one_by_one(loaded, prompts)[:, 1:-1]
    assert moments.n == len(prompts)
    assert moments.mean.shape == moments.m2.shape == (N_LAYERS, D_MODEL)
    assert moments.mean.dtype == torch.float64
    # float32 matrix products of another batch size round differently in the last bit or two
    torch.testing.assert_close(moments.mean[:-1], rows.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        moments.m2[:-1], rows.var(0, correction=0) * len(prompts), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("family", ["llama", "gemma", "phi3", "qwen2"])
@pytest.mark.parametrize("max_batch_tokens", [30, 4096])
def test_a_batch_is_its_prompts_one_by_one(tiny_loaded, prompts, family, max_batch_tokens):
    loaded = tiny_loaded(family)

    def direction(**options):
        target, contrast = (
            capture(TransformersEngine(loaded), half, **options)
            for half in (prompts[:20], prompts[20:])
        )
        return target.mean - contrast.mean

    alone = direction(max_batch_tokens=1)
    assert worst_cosine_gap(direction(max_batch_tokens=max_batch_tokens), alone) < 1e-10
    # Padding agrees as far as float32 goes, which shows that masks and positions are right.
    assert worst_cosine_gap(direction(padding="left", max_batch_tokens=60), alone) < 1e-9


@pytest.mark.parametrize("family", ["llama", "gemma", "phi3", "qwen2", "qwen"])
@pytest.mark.parametrize("position", [-1, -4])
def test_a_shared_beginning_runs_once(tiny_loaded, prompts, family, position):
    loaded = tiny_loaded(family)
    engine, begun = TransformersEngine(loaded), [[9] * 30 + ids for ids in prompts]
    tokens = 0

    def count(_module, _args, kwargs):
        nonlocal tokens
        tokens += kwargs["input_ids"].numel()

    def counted(**options):
        nonlocal tokens
        tokens = 0
        return capture(engine, begun, position=position, **options), tokens

    capture(engine, begun, position=position, share_prefix=True)  # what a model can is tried once
    hook = loaded.model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        (whole, run_whole), (shared, run_shared) = counted(), counted(share_prefix=True)
    finally:
        hook.remove()
    assert run_whole == sum(map(len, begun))
    if family == "qwen":  # a model with its own code
        assert run_shared == run_whole
        assert torch.equal(shared.mean, whole.mean)
    else:
        # of 3 tokens after the beginning, the fourth from the end is its last
        common = 30 if position == -1 else 29
        assert run_shared == run_whole - common * (len(prompts) - 1)
        assert worst_cosine_gap(shared.mean, whole.mean) < 1e-11
        torch.testing.assert_close(shared.m2, whole.m2, rtol=1e-4, atol=1e-5)


def test_a_shared_beginning_is_not_shared_in_padded_batches(tiny_loaded, prompts):
    engine, begun = TransformersEngine(tiny_loaded("llama")), [[9] * 30 + p for p in prompts]
    padded = capture(engine, begun, padding="left")
    assert torch.equal(capture(engine, begun, padding="left", share_prefix=True).mean, padded.mean)


def test_the_order_of_prompts_changes_rounding_only(tiny_loaded, prompts):
    loaded = tiny_loaded("llama")
    forward = capture(TransformersEngine(loaded), prompts)
    backward = capture(TransformersEngine(loaded), prompts[::-1])
    torch.testing.assert_close(forward.mean, backward.mean, rtol=0, atol=1e-6)
    assert torch.equal(capture(TransformersEngine(loaded), prompts).mean, forward.mean)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_position_counts_from_the_end_of_each_prompt(tiny_loaded, prompts, padding):
    loaded = tiny_loaded("llama")
    moments = capture(TransformersEngine(loaded), prompts, position=-3, padding=padding)
    expected = one_by_one(loaded, prompts, position=-3)[:, 1:-1].mean(0)
    torch.testing.assert_close(moments.mean[:-1], expected, rtol=1e-5, atol=1e-6)
    last = capture(TransformersEngine(loaded), prompts)
    assert worst_cosine_gap(moments.mean, last.mean) > 1e-3


def test_remote_code_with_blocks_that_return_tuples(tiny_loaded, prompts):
    loaded = tiny_loaded("qwen")
    engine = TransformersEngine(loaded)
    assert engine.blocks == block_paths("transformer.h", N_LAYERS)
    moments = capture(engine, prompts)
    padded = capture(engine, prompts, padding="left", max_batch_tokens=60)
    assert worst_cosine_gap(moments.mean, padded.mean) < 1e-9
    model = loaded.model.transformer
    alone = torch.tensor([prompts[0]])
    mask = torch.ones(alone.shape[1], alone.shape[1], dtype=torch.bool).tril()[None, None]
    with torch.inference_mode():
        expected = model.h[0](model.wte(alone), mask, None)[0][0, -1].double()
    torch.testing.assert_close(capture(engine, prompts[:1]).mean[0], expected)


def test_progress_adds_up(tiny_loaded, prompts):
    done = []
    capture(TransformersEngine(tiny_loaded("llama")), prompts, on_batch=done.append)
    assert len(done) > 1
    assert sum(done) == len(prompts)


def test_moments_come_back_from_disk_bit_for_bit(tiny_loaded, prompts, tmp_path):
    sets = {
        name: capture(TransformersEngine(tiny_loaded("llama")), some)
        for name, some in {"target": prompts[:9], "contrast.2": prompts[9:]}.items()
    }
    save_moments(tmp_path / "moments.safetensors", sets)
    back = load_moments(tmp_path / "moments.safetensors")
    assert back.keys() == sets.keys()
    for name, found in sets.items():
        assert back[name].n == found.n
        assert torch.equal(back[name].mean, found.mean)
        assert torch.equal(back[name].m2, found.m2)


def test_no_hook_stays(tiny_loaded, prompts):
    loaded = tiny_loaded("llama")

    def n_hooks():  # transformers keeps some of its own once hidden states were asked for
        return sum(len(module._forward_hooks) for module in loaded.model.modules())

    before = n_hooks()
    capture(TransformersEngine(loaded), prompts[:2])
    assert n_hooks() == before


@pytest.mark.parametrize("of_prompts", [capture, capture_vectors])
def test_nan_names_the_layer(of_prompts, tiny_loaded, prompts):
    loaded = tiny_loaded("llama")
    damaged = copy.deepcopy(loaded.model)
    damaged.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(DirectionError, match="layer 2"):
        of_prompts(TransformersEngine(dataclasses.replace(loaded, model=damaged)), prompts)


def test_vectors_are_those_whose_moments_are_captured(tiny_loaded, prompts):
    engine = TransformersEngine(tiny_loaded("llama"))
    moments, vectors = capture(engine, prompts), capture_vectors(engine, prompts)
    torch.testing.assert_close(vectors.double().mean(dim=0), moments.mean)


def test_no_prompts(tiny_loaded):
    with pytest.raises(DirectionError, match="no prompts"):
        capture(TransformersEngine(tiny_loaded("llama")), [])


@pytest.mark.parametrize("position", [-4, 0, 2])
def test_positions_that_are_not_there(tiny_loaded, position):
    with pytest.raises(DirectionError, match=f"{position}"):
        capture(TransformersEngine(tiny_loaded("llama")), [[5, 6, 7]], position=position)
