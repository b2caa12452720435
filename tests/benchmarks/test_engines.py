"""Engines that are not in the process: what to install or start, and servers."""

from __future__ import annotations

import pytest
import torch

from abliterator.benchmarks import RunSettings, require_engine
from abliterator.benchmarks._server import require_server, served_model
from abliterator.benchmarks._settings import open_model
from abliterator.errors import BenchmarkError
from abliterator.recipe import BenchmarkEngine, Benchmarks
from tests.benchmarks.toy import run, server_engine
from tests.helpers.completions_server import CompletionsServer
from tests.helpers.judge_server import JudgeServer
from tests.helpers.stand_in import accelerator, available


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (BenchmarkEngine(kind="vllm"), r"pip install 'lm-eval\[vllm\]'"),
        (server_engine("http://127.0.0.1:9/v1"), r"pip install 'lm-eval\[api\]'"),
    ],
)
def test_an_engine_that_is_not_installed_says_what_to_install(engine, message, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BenchmarkError, match=message):
        require_engine(engine)


@pytest.mark.skipif(not available(), reason="torch has no backend in Python")
def test_scores_of_another_device_than_the_one_asked_for_are_refused(plain):
    with (
        accelerator(),
        pytest.raises(BenchmarkError, match="computes on cpu, though fake is asked for"),
    ):
        open_model(plain, RunSettings(device="fake"))


def test_lm_eval_scores_a_model_that_is_spread(tiny_folder, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    folder = tiny_folder("llama")
    spread = open_model(folder, RunSettings(device="auto", max_memory=60_000))
    whole = open_model(folder, RunSettings(device="cpu"))
    ids = torch.tensor([[0, *range(4, 16)]])
    assert torch.equal(spread._model_call(ids), whole._model_call(ids))
    engine = BenchmarkEngine(options={"attn_implementation": "eager"})
    settings = RunSettings(device="auto", max_memory=60_000, section=Benchmarks(engine=engine))
    with pytest.raises(BenchmarkError, match="says attn_implementation, which is not possible"):
        open_model(folder, settings)


def test_a_server_that_is_not_there_says_what_to_start(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    with pytest.raises(BenchmarkError, match=r"127\.0\.0\.1:9.*vllm serve"):
        require_engine(server_engine("http://127.0.0.1:9/v1"))
    with pytest.raises(BenchmarkError, match="no http address"):
        require_server("file:///etc/passwd")


def test_a_server_that_passes_over_echo_is_refused(monkeypatch, plain):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    with CompletionsServer(plain) as server:
        require_engine(server_engine(server.url))
    silent = CompletionsServer(plain, echoes=False)
    with silent, pytest.raises(BenchmarkError, match="does not tell log-probabilities"):
        require_engine(server_engine(silent.url))


@pytest.mark.parametrize("chat_template", [False, True])
@pytest.mark.parametrize("model", ["plain", "with BOS"])
def test_a_server_gives_the_numbers_of_the_model_in_process(
    plain, tiny_folder, tasks, model, chat_template
):
    pytest.importorskip("tenacity", reason="lm-eval[api] is not installed")
    folder = plain if model == "plain" else tiny_folder("llama")
    settings = {"batch_size": 3, "limit": 8, "num_fewshot": 1, "chat_template": chat_template}
    expected = run(folder, tasks, **settings)
    with CompletionsServer(folder) as server:
        found = run(folder, tasks, engine=server_engine(server.url), **settings)
    assert {len(asked["prompt"]) for asked in server.asked} == {3, 1, 2}
    for name, scores in found.items():
        assert scores.settings == {**expected[name].settings, "engine": "server"}
        for ours, theirs in zip(scores.scores, expected[name].scores, strict=True):
            assert ours.gold_loglik == pytest.approx(theirs.gold_loglik, abs=1e-4)
            assert ours.confidence == pytest.approx(theirs.confidence, abs=1e-4)
            exact = {"gold_loglik": None, "confidence": None}
            assert ours.model_copy(update=exact) == theirs.model_copy(update=exact)


def test_a_benchmark_server_is_not_followed_elsewhere(sends_on):
    with JudgeServer() as other:
        url = sends_on(f"{other.url}/models", 302)
        with pytest.raises(BenchmarkError, match="another server"):
            served_model(url)
