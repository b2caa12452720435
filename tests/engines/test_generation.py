"""Greedy answers against a loop of single forward passes."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from transformers import GenerationConfig

from abliterator.devices import Memory
from abliterator.engines import _generate
from abliterator.engines._generate import generate, stop_ids
from abliterator.errors import GenerationError
from tests.helpers.tiny import FAMILIES, VOCABULARY


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(4)
    lengths = torch.randint(2, 15, (13,), generator=generator).tolist()
    return [torch.randint(4, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def greedy(loaded, prompt, max_new_tokens, stops):
    """The oracle: the whole sequence through the model for every token, no cache, no padding."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(max_new_tokens):
            token = int(loaded.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token in stops:
                return tuple(ids[len(prompt) :]), "stop"
            ids.append(token)
    return tuple(ids[len(prompt) :]), "length"


def common_stops(loaded, prompts):
    """Stop tokens that end some answers of a random model, and leave others to run on."""
    answers = generate(loaded, prompts, max_new_tokens=8, batch_size=4, stop_ids=())
    return sorted({answer.token_ids[3] for answer in answers[::2]})


@pytest.mark.parametrize("family", ["llama", "gemma", "phi3", "qwen3", "qwen"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_answers_are_greedy_whatever_the_batch(tiny_loaded, prompts, family, batch_size):
    loaded = tiny_loaded(family)
    stops = common_stops(loaded, prompts)
    answers = generate(loaded, prompts, max_new_tokens=8, batch_size=batch_size, stop_ids=stops)
    expected = [greedy(loaded, prompt, 8, stops) for prompt in prompts]
    assert [(a.token_ids, a.finish_reason) for a in answers] == expected
    assert {a.finish_reason for a in answers} == {"stop", "length"}


def test_without_a_number_as_many_prompts_are_answered_together_as_a_processor_has_memory_for(
    tiny_loaded, prompts, monkeypatch
):
    sizes = []
    options = {"max_new_tokens": 3, "stop_ids": (), "on_batch": sizes.append}
    answers = generate(tiny_loaded("llama"), prompts * 6, **options)
    assert sizes == [64, 14]
    assert answers[:13] == generate(tiny_loaded("llama"), prompts, batch_size=4, **options)
    sizes.clear()
    monkeypatch.setattr(_generate, "device_memory", lambda device: Memory(1 << 20, 1 << 20))
    assert generate(tiny_loaded("llama"), prompts * 2, **options) == answers[:26]
    assert sizes == [16, 10]


def test_a_stop_on_the_last_step_is_a_stop(tiny_loaded, prompts):
    loaded = tiny_loaded("llama")
    free = generate(loaded, prompts[:1], max_new_tokens=4, batch_size=1, stop_ids=())[0]
    stop = next(t for i, t in enumerate(free.token_ids) if t not in free.token_ids[:i] and i)
    steps = free.token_ids.index(stop) + 1
    answer = generate(loaded, prompts[:1], max_new_tokens=steps, batch_size=1, stop_ids=[stop])[0]
    assert answer.finish_reason == "stop"
    assert answer.token_ids == free.token_ids[: steps - 1]


def test_text_has_no_special_tokens(tiny_loaded, prompts):
    loaded = tiny_loaded("llama")
    for answer in generate(loaded, prompts, max_new_tokens=8, batch_size=4, stop_ids=()):
        text = "".join(t for i in answer.token_ids if (t := loaded.tokenizer.decode([i])))
        assert answer.text == loaded.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
        assert not any(special in answer.text for special in loaded.tokenizer.all_special_tokens)
        assert len(text) >= len(answer.text)


LEAKS = {
    "do_sample": True,
    "temperature": 5.0,
    "top_k": 3,
    "repetition_penalty": 50.0,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(4, 200)),
    "max_length": 3,
    "min_new_tokens": 5,
    "num_beams": 3,
}


def test_the_models_own_settings_do_not_apply(tiny_loaded, prompts):
    loaded = tiny_loaded("llama")
    options = {"max_new_tokens": 8, "batch_size": 4, "stop_ids": common_stops(loaded, prompts)}
    plain = generate(loaded, prompts, **options)
    model = copy.deepcopy(loaded.model)
    model.generation_config = own = GenerationConfig(**LEAKS)
    assert generate(dataclasses.replace(loaded, model=model), prompts, **options) == plain
    assert model.generation_config is own
    # They would have: transformers merges them into a config that leaves them unset.
    merged = model.generate(
        torch.tensor(prompts[:1]),
        generation_config=GenerationConfig(do_sample=False, num_beams=1, max_new_tokens=8),
    )
    assert tuple(merged[0, len(prompts[0]) :].tolist()) != plain[0].token_ids


def test_settings_come_back_after_an_error(tiny_loaded, prompts, monkeypatch):
    loaded = tiny_loaded("llama")
    own = loaded.model.generation_config
    monkeypatch.setattr(type(loaded.model), "forward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(loaded, prompts, max_new_tokens=2, batch_size=4, stop_ids=())
    assert loaded.model.generation_config is own


def test_a_batch_too_large_for_memory_is_halved(tiny_loaded, prompts, monkeypatch):
    loaded = tiny_loaded("llama")
    options = {"max_new_tokens": 5, "stop_ids": ()}
    expected = generate(loaded, prompts, batch_size=1, **options)
    forward = type(loaded.model).forward
    largest = []

    def small_memory(self, input_ids=None, **kwargs):
        largest.append(len(input_ids))
        if len(input_ids) > 3:
            raise torch.OutOfMemoryError("no room")
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(loaded.model), "forward", small_memory)
    done = []
    assert generate(loaded, prompts, batch_size=8, on_batch=done.append, **options) == expected
    assert largest[0] == 8
    assert sum(done) == len(prompts)
    assert max(done) <= 3


def test_an_empty_prompt_is_named(tiny_loaded):
    with pytest.raises(GenerationError, match="Prompt 1"):
        generate(tiny_loaded("llama"), [[5], []], max_new_tokens=2, batch_size=2, stop_ids=())


def test_no_prompts_no_answers(tiny_loaded):
    assert generate(tiny_loaded("llama"), [], max_new_tokens=2, batch_size=2, stop_ids=()) == []


def test_stop_ids_gather_every_declaration(tiny_loaded):
    loaded = tiny_loaded("llama")
    model = copy.deepcopy(loaded.model)
    model.generation_config.eos_token_id = [7, 5]
    model.config.eos_token_id = 9
    assert stop_ids(dataclasses.replace(loaded, model=model)) == (2, 5, 7, 9)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    assert stop_ids(dataclasses.replace(loaded, model=model)) == (2,)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_prompts_share_may_run_once(tiny_loaded, prompts, family):
    loaded = tiny_loaded(family)
    shared = [[5, 6, 7, 8, 9, *prompt] for prompt in prompts]
    stops = common_stops(loaded, shared)
    answers = generate(
        loaded, shared, max_new_tokens=8, batch_size=5, stop_ids=stops, share_prefix=True
    )
    expected = [greedy(loaded, prompt, 8, stops) for prompt in shared]
    assert [(a.token_ids, a.finish_reason) for a in answers] == expected


def test_what_is_shared_does_not_run_again(tiny_loaded, prompts):
    loaded, seen = tiny_loaded("llama"), []
    shared = [[5, 6, 7, 8, 9, *prompt] for prompt in prompts[:4]]
    options = {"max_new_tokens": 2, "batch_size": 4, "stop_ids": (), "share_prefix": True}
    generate(loaded, shared, **options)  # what a model does with padding is measured once
    handle = loaded.model.model.embed_tokens.register_forward_hook(
        lambda module, args, output: seen.append(tuple(args[0].shape))
    )
    generate(loaded, shared, max_new_tokens=2, batch_size=4, stop_ids=(), share_prefix=True)
    handle.remove()
    longest = max(len(prompt) for prompt in prompts[:4])
    assert seen == [(1, 5), (4, longest), (4, 1)]
