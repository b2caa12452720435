"""NaN and infinity stop by name where they arise; -inf of suppressed tokens is probability 0."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from abliterator.capture import capture
from abliterator.cli import main
from abliterator.engines import AnswerPath, TransformersEngine
from abliterator.errors import DirectionError, GenerationError
from abliterator.evaluation import (
    LogitFile,
    answer_path,
    kl_divergence,
    kl_terms,
    neutral_text,
    text_perplexity,
)
from abliterator.model import load_model
from tests.tuning.seams import tuned_logprobs

PROMPTS = [[5, 6, 7, 8], [9, 10, 11]]
PATHS = [answer_path(p, [20, 21], tokens=3, stopped=False) for p in PROMPTS]


def changed(loaded, row, value, *, logit=None):
    """A copy with a value in its head; or, with `logit`, one entry of the vocabulary set to it."""
    model = copy.deepcopy(loaded.model)
    if logit is None:
        model.lm_head.weight.data[row, 3] = value
    else:
        model.lm_head.register_forward_hook(
            lambda module, args, out: out.index_fill(-1, torch.tensor([row]), logit)
        )
    return dataclasses.replace(loaded, model=model)


def along(loaded):
    """Logits along `PATHS`."""
    return TransformersEngine(loaded).logits(PATHS, max_batch_tokens=64)


def written(loaded, folder):
    """A file of the logits along `PATHS`."""
    file = LogitFile(folder / "base")
    file.write(PATHS, along(loaded))
    return file


@pytest.mark.parametrize(
    ("value", "says"), [(math.nan, "are NaN"), (math.inf, "infinite|NaN"), (-math.inf, "infinite")]
)
@pytest.mark.parametrize("tensor", ["lm_head.weight", "model.layers.1.mlp.down_proj.weight"])
def test_the_first_pass_of_a_loaded_model(writable, value, says, tensor):
    weights = load_file(writable / "model.safetensors")
    weights[tensor][30] = value
    save_file(weights, writable / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GenerationError, match=f"logits of the model in .*model are ({says}|NaN)"):
        load_model(writable, device="cpu", dtype="float32")


def test_a_broken_base_stops_a_build_before_anything_ran(writable, tmp_path):
    weights = load_file(writable / "model.safetensors")
    weights["lm_head.weight"][30, 3] = math.inf
    save_file(weights, writable / "model.safetensors", metadata={"format": "pt"})
    for name in ("target", "neutral"):
        prompts = "\n".join(f"{name}: which river runs through town {i}?" for i in range(12))
        (tmp_path / f"{name}.txt").write_text(prompts)
    (tmp_path / "r.yaml").write_text(
        f"model: {writable}\nlayers: [2]\nk: 1\nrollouts: {{max_new_tokens: 3}}\n"
        "prompts: {target: {path: target.txt}, neutral: {path: neutral.txt}}\n"
    )
    arguments = ["build", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1, done.exception
    assert "infinite" in done.stderr
    assert "lm_head" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_stop_wherever_they_are_used(tiny_loaded, tmp_path, value):
    broken = changed(tiny_loaded(), 30, None, logit=value)
    engine = TransformersEngine(broken)
    greedy = {"max_new_tokens": 2}
    first = [AnswerPath(tuple(p), 1) for p in PROMPTS]
    forced = [AnswerPath((*p, 3), 2) for p in PROMPTS]
    uses = {
        "answers": lambda: engine.answers(PROMPTS, batch_size=2, stop_ids=(), **greedy),
        "shared": lambda: engine.answers(
            [[5] * 9 + p for p in PROMPTS], batch_size=2, stop_ids=(), share_prefix=True, **greedy
        ),
        "stream": lambda: engine.stream(PROMPTS[0], on_text=lambda text: None, **greedy),
        "first": lambda: list(engine.logits(first, max_batch_tokens=64)),
        "write": lambda: LogitFile(tmp_path / "f").write(PATHS, along(broken)),
        "perplexity": lambda: text_perplexity(engine, neutral_text()[:1]),
        "forced": lambda: list(engine.logits(forced, max_batch_tokens=64, share_prefix=True)),
        "refusal": lambda: engine.log_likelihoods(PROMPTS, [(3, 4)], max_batch_tokens=64),
        "tuning": lambda: tuned_logprobs(broken, PROMPTS, [(3, 4)] * len(PROMPTS)),
    }
    for use in uses.values():
        with pytest.raises(GenerationError, match="next-token logits of the model in"):
            use()
    file = written(tiny_loaded(), tmp_path)
    with pytest.raises(GenerationError, match="next-token logits"):
        file.compare(PATHS, along(broken))


def test_residuals_that_overflow_name_their_layer(tiny_loaded):
    model = copy.deepcopy(tiny_loaded().model)
    model.model.layers[1].mlp.down_proj.weight.data.mul_(1e30)
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1e30)
    with pytest.raises(DirectionError, match="layer 2 holds NaN or infinite"):
        capture(TransformersEngine(dataclasses.replace(tiny_loaded(), model=model)), PROMPTS)


def test_suppressed_tokens_are_probability_zero(tiny_loaded, tmp_path):
    """-inf on both sides counts nothing; the KL is that of the other tokens."""
    base, whole = changed(tiny_loaded(), 30, None, logit=-math.inf), tiny_loaded()
    file = written(base, tmp_path)
    same = file.compare(PATHS, along(base))
    assert all(torch.equal(path.kl, torch.zeros_like(path.kl)) for path in same)
    found = file.compare(PATHS, along(whole))
    for path, ids in zip(found, PATHS, strict=True):
        logits = whole.model(torch.tensor([ids.token_ids])).logits[0, -ids.positions :].double()
        p = logits.index_fill(-1, torch.tensor([30]), -math.inf).softmax(-1)
        expected = torch.xlogy(p, p).sum(-1) - torch.nan_to_num(p * logits.log_softmax(-1)).sum(-1)
        torch.testing.assert_close(path.kl, expected, rtol=1e-4, atol=1e-6)
    answers = TransformersEngine(base).answers(PROMPTS, max_new_tokens=3, batch_size=2, stop_ids=())
    assert all(30 not in answer.token_ids for answer in answers)


def test_a_token_that_only_the_edit_suppresses_is_an_infinite_kl_by_name(tiny_loaded, tmp_path):
    edited = changed(tiny_loaded(), 30, None, logit=-math.inf)
    file = written(tiny_loaded(), tmp_path)
    with pytest.raises(GenerationError, match="gives probability 0 to a token"):
        file.compare(PATHS, along(edited))


def test_a_text_of_probability_zero_has_no_perplexity(tiny_loaded):
    token = tiny_loaded().tokenizer(neutral_text()[0])["input_ids"][5]
    with pytest.raises(GenerationError, match="no perplexity"):
        text_perplexity(
            TransformersEngine(changed(tiny_loaded(), token, None, logit=-math.inf)),
            neutral_text()[:1],
        )


def test_kl_does_not_swallow_nan():
    base = torch.tensor([[0.5, 0.5]]).log()
    for broken in (torch.tensor([[math.nan, 0.0]]), torch.tensor([[math.nan, math.nan]])):
        assert kl_divergence(base, broken).isnan().all()
        assert kl_divergence(broken, base).isnan().all()


def test_gradients_of_suppressed_tokens_are_numbers():
    logits = torch.tensor([[1.0, 2.0, -math.inf]], requires_grad=True)
    base = torch.tensor([[2.0, 1.0, -math.inf]]).log_softmax(-1)
    kl = kl_terms(base, logits.log_softmax(-1)).sum()
    kl.backward()
    assert kl.isfinite()
    assert logits.grad.isfinite().all()
