"""Batches, shared beginnings and padding against one prompt at a time, on the whole table."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch

from abliterator.engines import AnswerPath, TransformersEngine
from abliterator.model import LoadedModel, _padding, run_prefix
from abliterator.selection import FARTHEST, log_odds
from tests.anatomy.test_architectures import NAMES, vanilla
from tests.helpers import architectures
from tests.tuning.seams import tuned_logprobs

SYSTEM = [7, 8, 9, 10, 11, 12]
_GENERATOR = torch.Generator().manual_seed(4)
PROMPTS = [
    [*SYSTEM, *torch.randint(4, 90, (n,), generator=_GENERATOR).tolist()]
    for n in (1, 30, 2, 17, 9, 4, 25, 7)
]
LENGTH = 6

# Tiny models of these cannot answer at all, one by one neither: xLSTM's kernels want larger heads,
# and the configs that transformers makes of Omni's text half lack a token of images.
UNABLE = {"qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", "xlstm"}
# Keys are chosen among those that are there, ties by how many there are, so that a longer row gives
# other logits at its beginning; and PaliGemma reads what is to come, where it is there.
INCONSISTENT = {"axk2", "deepseek_v32", "dots3_note", "dots3_note_text", "glm_moe_dsa"}
INCONSISTENT |= {"mistral_large4", "paligemma"}
# The same of several streams: the logits of a prompt, and of the same in a longer row, in float32
# differ by .6 nats (DeepSeek V4) to 5.5 (Hy V4).
INCONSISTENT |= {"deepseek_v4", "glm5_next", "hy_v4", "hy_v4_vl"}
# A batch without padding is left to these, and for the second what is shared then runs once still.
UNPADDED = INCONSISTENT | {"qwen4_exp", "qwen4_exp_text", "recurrent_gemma", "zamba"}
NO_GAP = {"hyperclovax_vision_v2", "mpt"}
# Several tokens that continue their states count as the beginning of a prompt.
NOT_CONTINUED = {"falcon_mamba", "jamba", "mamba", "zamba"}


class Tokenizer:
    """What greedy answers ask of one."""

    pad_token_id, eos_token_id = 3, 2
    added_tokens_decoder, all_special_ids = {}, ()

    def decode(self, ids, **options):
        return " ".join(map(str, ids))


def loaded_of(model, folder):
    return LoadedModel(model, Tokenizer(), folder, "cpu")


@pytest.fixture(scope="module", params=[name for name in NAMES if name not in UNABLE])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def loaded(name, tmp_path_factory):
    folder = architectures.save(name, tmp_path_factory.mktemp(name))
    return loaded_of(vanilla(folder), folder)


def answers(loaded, prompts=PROMPTS, **options):
    engine = TransformersEngine(loaded)
    found = engine.answers(prompts, max_new_tokens=LENGTH, stop_ids=(), **options)
    return [answer.token_ids for answer in found]


@pytest.fixture(scope="module")
def alone(loaded):
    """The answers of one prompt at a time."""
    return answers(loaded, batch_size=1)


def assert_close(one, other):
    torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_answers_are_those_of_one_by_one(name, loaded, alone):
    assert answers(loaded, batch_size=4) == alone
    assert answers(loaded, batch_size=4, share_prefix=True) == alone
    assert answers(loaded, PROMPTS[::-1], batch_size=3, share_prefix=True) == alone[::-1]
    known = _padding._neutral_widths[loaded.model]
    assert (known["left"] < 0) == (name in UNPADDED)
    assert (known.get("between", 0) < 0) == (name in NO_GAP)


def test_given_answers_are_read_as_one_by_one(name, loaded, alone):
    forced = [ids[: 1 + i % 4] for i, ids in enumerate(alone)]
    with torch.inference_mode():
        whole = [
            loaded.model(torch.tensor([[*p, *f]]), use_cache=False).logits[0, len(p) - 1 :]
            for p, f in zip(PROMPTS, forced, strict=True)
        ]
        expected = [logits.log_softmax(-1) for logits in whole]
        tuned = tuned_logprobs(loaded, PROMPTS, forced)
    paths = [AnswerPath((*p, *f), len(f) + 1) for p, f in zip(PROMPTS, forced, strict=True)]
    engine = TransformersEngine(loaded)
    for share in (True, False):
        found = dict(engine.logits(paths, max_batch_tokens=64, share_prefix=share))
        assert sorted(found) == list(range(len(PROMPTS)))
        for index, logits in found.items():
            assert_close(logits.log_softmax(-1), expected[index])
    for found, wanted in zip(tuned, expected, strict=True):
        assert_close(found, wanted[:-1])


def test_residuals_are_those_of_whole_prompts(name, loaded):
    engine = TransformersEngine(loaded)

    def residuals(**options):
        rows = {}
        for batch, found in engine.hidden_states(PROMPTS, positions=(-1, -2), **options):
            rows.update(zip(batch, found, strict=True))
        return torch.stack([rows[i] for i in range(len(PROMPTS))])

    whole, shared = residuals(), residuals(share_prefix=True)
    assert_close(shared, whole)
    assert not torch.equal(shared[0], shared[1])


def test_openings_are_scored_as_one_by_one(name, loaded):
    openings = [(11, 12, 13), (20, 21)]  # of two lengths, so that one is padded where they share

    def scores(prompts, **options):
        engine = TransformersEngine(loaded)
        return log_odds(engine.log_likelihoods(prompts, openings, max_batch_tokens=64, **options))

    found, alone = scores(PROMPTS), [scores([prompt]) for prompt in PROMPTS]
    # a difference of log-odds adds the rounding of several log-probabilities
    torch.testing.assert_close(found, torch.cat(alone), atol=5e-4, rtol=0)
    torch.testing.assert_close(found, scores(PROMPTS, together=True), atol=5e-4, rtol=0)
    if name in INCONSISTENT:
        return
    expected = []
    for prompt in PROMPTS:
        log_p = []
        for opening in openings:
            with torch.inference_mode():
                row = torch.tensor([[*prompt, *opening]])
                logits = loaded.model(row, use_cache=False).logits[0, len(prompt) - 1 : -1]
            steps = torch.arange(len(opening))
            log_p.append(logits.double().log_softmax(-1)[steps, torch.tensor(opening)].sum())
        together = torch.stack(log_p).logsumexp(0)
        odds = together - (-torch.expm1(together)).log()
        expected.append(odds.clamp(-FARTHEST, FARTHEST))
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-3, rtol=0)
    if name in NOT_CONTINUED:  # others may be left whole for their rounding alone
        # not measured where transformers returns no cache of the model at all
        assert _padding._neutral_widths[loaded.model].get("continued", -1) < 0


def test_windows_by_index_are_seen_though_answers_begin_alike(tmp_path):
    """GPT-Neo's local attention counts pads, which shows beyond its window only."""
    config = architectures.build("gpt_neo").config
    config.window_size = 8
    model = type(architectures.build("gpt_neo"))(config).eval()
    architectures.randomise(model)
    loaded = loaded_of(model, tmp_path)
    alone = answers(loaded, batch_size=1)
    assert answers(loaded, batch_size=4, share_prefix=True) == alone
    assert answers(loaded, batch_size=4) == alone
    assert _padding._neutral_widths[model]["between"] < 0


@pytest.mark.parametrize("name", ["mpt", "hyperclovax_vision_v2", "recurrent_gemma", "zamba"])
def test_padding_that_was_not_measured_shows(name, tmp_path, monkeypatch):
    """The negative of the tests above: without the measurement these differ."""
    folder = architectures.save(name, tmp_path)
    loaded = loaded_of(vanilla(folder), folder)
    alone = answers(loaded, batch_size=1)
    monkeypatch.setattr(_padding, "_same", lambda *_: True)
    assert answers(loaded, batch_size=4, share_prefix=True) != alone


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "neutral"),
    [("llama", True), ("gemma", True), ("qwen3_moe", True), ("mpt", False), ("zamba", False)],
)
def test_rounding_is_not_taken_for_padding(name, neutral, dtype, tmp_path):
    folder = architectures.save(name, tmp_path)
    loaded = loaded_of(vanilla(folder).to(dtype), folder)
    answers(loaded, batch_size=4, share_prefix=True)
    known = _padding._neutral_widths[loaded.model]
    assert known.get("between", known.get("left")) >= 0 if neutral else min(known.values()) < 0


def test_it_is_measured_once_and_again_for_wider_rows(tiny_loaded, monkeypatch):
    model = type(tiny_loaded().model)(tiny_loaded().model.config).eval()
    loaded, measured = dataclasses.replace(tiny_loaded(), model=model), Counter()
    same = _padding._same
    monkeypatch.setattr(_padding, "_same", lambda *a: measured.update(n=1) or same(*a))
    for _ in range(2):
        answers(loaded, batch_size=4)
    assert measured["n"] == 1
    answers(loaded, [*PROMPTS, [5] * 60], batch_size=4)
    assert measured["n"] == 2
    answers(loaded, [[5] * 60] * 2, batch_size=4)  # no padding, nothing to measure
    assert measured["n"] == 2


def test_a_model_that_keeps_no_cache_shares_nothing(tmp_path):
    folder = architectures.save("recurrent_gemma", tmp_path)
    loaded = loaded_of(vanilla(folder), folder)
    with torch.inference_mode():
        assert run_prefix(loaded, PROMPTS).length == 0
