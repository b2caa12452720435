"""Engines that are not in the process: what to install or start, and servers."""

from __future__ import annotations

import pytest

from abliterator.benchmarks import RunSettings, require_engine
from abliterator.benchmarks._server import require_server, served_model
from abliterator.benchmarks._settings import open_model
from abliterator.errors import BenchmarkError
from abliterator.recipe import BenchmarkEngine
from tests.benchmarks.toy import run, server_engine
from tests.helpers.completions_server import CompletionsServer
from tests.helpers.judge_server import JudgeServer


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


@pytest.mark.parametrize("device", ["xpu", "hpu:0"])
def test_scores_of_another_device_than_the_one_asked_for_are_refused(plain, device):
    with pytest.raises(BenchmarkError, match=f"computes on cpu, though {device} is asked for"):
        open_model(plain, RunSettings(device=device))


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
            exact = {"gold_loglik": None}
            assert ours.model_copy(update=exact) == theirs.model_copy(update=exact)


def test_a_benchmark_server_is_not_followed_elsewhere(sends_on):
    with JudgeServer() as other:
        url = sends_on(f"{other.url}/models", 302)
        with pytest.raises(BenchmarkError, match="another server"):
            served_model(url)
