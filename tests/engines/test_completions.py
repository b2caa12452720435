"""Answers of servers against those of the model in this process, and servers that are not right."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from abliterator.engines import (
    AnswerPath,
    CompletionClient,
    Sampling,
    ServedByName,
    ServedEngine,
    Steering,
    TransformersEngine,
    _completions,
    require_two_models,
)
from abliterator.errors import GenerationError, PromptError, ServerError
from abliterator.recipe import load_engine
from abliterator.server import Reply
from tests.helpers.answer_server import AnswerServer, answers_of, echoing
from tests.server.seams import shorten_waits

PROMPTS = [[1, *range(4, 4 + n)] for n in (3, 9, 6, 6, 12, 5)]


@pytest.fixture
def loaded(tiny_loaded):
    return TransformersEngine(tiny_loaded("llama"))


def served(server, folder, tokenizer, cache, *, name="base", passes=None, **engine):
    """The engine whose answers come from a server; passes are an error unless given."""
    values = {"kind": "server", "base_url": server.url, "base": "base", **engine}
    section = load_engine([f"engine.{key}={value}" for key, value in values.items()])
    client = CompletionClient(section.server("base", model="x"), tokenizer, cache=cache)

    def no_passes():
        raise AssertionError("weights were loaded")

    return ServedEngine(
        folder, tokenizer, ServedByName(client, name, "digest"), passes or no_passes
    )


@pytest.fixture
def engine_of(loaded, tmp_path):
    def engine(server, **options):
        cache = tmp_path / "answers.sqlite"
        return served(server, loaded.loaded.folder, loaded.tokenizer, cache, **options)

    return engine


FORMS = {
    "vllm": "token ids",
    "llama.cpp": "token ids of log-probabilities",
    "text out": "text, encoded again",
}


@pytest.mark.parametrize("kind", FORMS)
def test_answers_are_those_of_the_model_in_process(loaded, engine_of, kind):
    expected = loaded.answers(PROMPTS, max_new_tokens=12, batch_size=2)
    with AnswerServer({"base": answers_of(lambda: loaded)}, loaded.tokenizer, kind=kind) as server:
        engine = engine_of(server)
        assert engine.probed(PROMPTS[0], max_new_tokens=12).form.name == FORMS[kind]
        done = []
        found = engine.answers(PROMPTS, max_new_tokens=12, batch_size=2, on_batch=done.append)
    if kind == "text out":  # a tiny model's tokens are not those of its text
        assert [answer.finish_reason for answer in found] == [
            answer.finish_reason for answer in expected
        ]
    else:
        assert found == expected
    assert done == [1] * len(PROMPTS)
    assert all(body["stop_token_ids"] == list(loaded.stop_ids) for body in server.bodies)
    assert {body["temperature"] for body in server.bodies} == {0}


@pytest.mark.parametrize("kind", ["vllm", "text out", "text"])
def test_a_server_is_asked_for_drawn_answers(loaded, engine_of, kind):
    """Its own sampling: temperature and a seed a prompt and sample go out, and replies are kept."""
    prompts = [loaded.tokenizer(text)["input_ids"] for text in ("Name a planet.", "Count to three")]
    with AnswerServer({"base": echoing}, loaded.tokenizer, kind=kind) as server:
        engine = engine_of(server)
        options = {"max_new_tokens": 3, "batch_size": 2}
        engine.answers(prompts, **options)
        asked = len(server.bodies)
        for sample in (0, 1, 0):
            drawn = Sampling(temperature=0.7, top_p=0.9, seed=1, sample=sample)
            engine.answers(prompts, sampling=drawn, **options)
    bodies = server.bodies[asked:]
    assert len(bodies) == len({body["seed"] for body in bodies}) == 4  # the third was answered
    assert {(body["temperature"], body["top_p"]) for body in bodies} == {(0.7, 0.9)}
    assert all(0 <= body["seed"] < 1 << 31 for body in bodies)
    whole = {(body.get("top_k"), body.get("min_p")) for body in bodies}
    assert whole == {(None, None) if kind == "text" else (-1, 0.0)}
    assert not {"seed", "top_p"} & {key for body in server.bodies[:asked] for key in body}


def test_a_server_that_takes_text_alone_gets_text_of_the_same_tokens(loaded, engine_of):
    texts = ["Name a planet.", "Count to three"]
    prompts = [loaded.tokenizer(text)["input_ids"] for text in texts]
    with AnswerServer({"base": echoing}, loaded.tokenizer, kind="text") as server:
        engine = engine_of(server)
        found = engine.answers(prompts, max_new_tokens=3, batch_size=2)
        assert [len(answer.token_ids) for answer in found] == [3, 3]
        shuffled = [prompts[0][:1] + prompts[0][::-1]]
        with pytest.raises(ServerError, match="no text that the tokenizer encodes to the same"):
            engine.answers(shuffled, max_new_tokens=3, batch_size=2)
    assert {type(body["prompt"]) for body in server.bodies} == {str, list}


def test_limits_stop_tokens_and_shape_are_those_of_the_loaded_model(
    tiny_folder, tiny_loaded, tiny_tokenizer, tmp_path
):
    for family in ("llama", "gemma", "qwen2"):
        own = TransformersEngine(tiny_loaded(family))
        with AnswerServer({"base": echoing}, own.tokenizer) as server:
            engine = served(server, tiny_folder(family), own.tokenizer, tmp_path / "a.sqlite")
            assert engine.stop_ids == own.stop_ids
            assert engine.limits == own.limits
            assert engine.hidden_shape == own.hidden_shape


def test_passes_are_of_another_engine_and_so_are_answers_under_an_edit(loaded, engine_of):
    notes, steering = [], Steering(1, 5 * torch.randn(loaded.hidden_shape[1]))
    path = [AnswerPath((1, 5, 6, 7), 2)]
    with AnswerServer({"base": answers_of(lambda: loaded)}, loaded.tokenizer) as server:
        engine = engine_of(server, passes=lambda: loaded)
        engine.note = notes.append
        with engine.edited(steering):
            under = engine.answers(PROMPTS, max_new_tokens=4, batch_size=2)
            logits = [rows for _, rows in engine.logits(path, max_batch_tokens=64)]
            engine.answers(PROMPTS, max_new_tokens=4, batch_size=2)
        assert not server.bodies
        plain = [rows for _, rows in engine.logits(path, max_batch_tokens=64)]
        with engine.edited_side_by_side([steering], max_batch_tokens=64) as several:
            beside = several.answers(PROMPTS, max_new_tokens=4, batch_size=6)
        assert engine.answers(PROMPTS, max_new_tokens=4, batch_size=2) != under
        assert server.bodies
    with loaded.edited(steering):
        assert loaded.answers(PROMPTS, max_new_tokens=4, batch_size=2) == under
        expected = [rows for _, rows in loaded.logits(path, max_batch_tokens=64)]
    assert torch.equal(logits[0], expected[0])
    assert not torch.equal(logits[0], plain[0])
    assert beside == [under]
    assert len(notes) == 1
    assert "Answers under an edit come from this process" in notes[0]


def test_faults_are_tried_again(loaded, engine_of, monkeypatch):
    shorten_waits(monkeypatch)
    faults = {"429": 0.1, "500": 0.1, "drop": 0.1, "html": 0.1}
    with AnswerServer({"base": echoing}, loaded.tokenizer, faults=faults) as server:
        prompts = [[1, 4 + n, 5, 6] for n in range(40)]
        engine = engine_of(server, concurrency=4)
        found = engine.answers(prompts, max_new_tokens=2, batch_size=1)
    assert [answer.token_ids for answer in found] == [(5, 6)] * 40
    assert sum(server.failed.values()) > 5
    assert server.most_at_once <= 4


def test_a_second_run_asks_nothing_again(loaded, engine_of):
    with AnswerServer({"base": echoing, "other": echoing}, loaded.tokenizer) as server:
        first = engine_of(server).answers(PROMPTS, max_new_tokens=2, batch_size=1)
        asked = len(server.bodies)
        assert engine_of(server).answers(PROMPTS, max_new_tokens=2, batch_size=1) == first
        assert len(server.bodies) == asked + 1  # the probe
        engine_of(server, name="other").answers(PROMPTS[:1], max_new_tokens=2, batch_size=1)
        assert len(server.bodies) == asked + 3


KILLED = """
import sys
from pathlib import Path
from abliterator.engines import CompletionClient, ServedByName, ServedEngine
from abliterator.model import load_tokenizer
from abliterator.recipe import load_engine

url, folder, cache = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
section = load_engine(["engine.kind=server", f"engine.base_url={url}", "engine.concurrency=8"])
tokenizer = load_tokenizer(folder)
client = CompletionClient(section.server("base", model="base"), tokenizer, cache=cache)
engine = ServedEngine(folder, tokenizer, ServedByName(client, "base", "digest"), passes=None)
prompts = [[1, 4 + n, 5, 6] for n in range(64)]
answers = engine.answers(prompts, max_new_tokens=2, batch_size=1)
print(len(answers), {answer.token_ids for answer in answers})
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_run_repeats_only_what_was_in_flight(loaded, tiny_folder, tmp_path):
    folder, cache = tiny_folder("llama"), tmp_path / "answers.sqlite"
    command = [sys.executable, "-c", KILLED]
    with AnswerServer({"base": echoing}, loaded.tokenizer, latency=0.1) as server:
        arguments = [server.url, folder, cache]
        child = subprocess.Popen([*command, *arguments], env=os.environ)
        while sum(server.prompts.values()) < 30 and child.poll() is None:
            time.sleep(0.01)
        child.kill()
        assert child.wait() == -signal.SIGKILL
        time.sleep(0.5)  # what was in flight is answered, to nobody
        with sqlite3.connect(cache) as file:
            kept = file.execute("SELECT count(*) FROM replies").fetchone()[0]
        again = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
    assert again.stdout == "64 {(5, 6)}\n"
    times = Counter(server.answered.values())
    probe = str([1, 4, 5, 6])  # it has the tokens of the first prompt, which was asked for too
    repeated = sum(n > 1 for (_, prompt), n in server.answered.items() if prompt != probe)
    assert 20 < kept < 64
    assert len(server.answered) == 64
    assert repeated <= 8, times


def refused(server, engine_of, says, prompts=PROMPTS, **options):
    with pytest.raises(ServerError, match=says):
        engine_of(server, **options).answers(prompts, max_new_tokens=4, batch_size=1)


def test_a_name_that_is_not_served(loaded, engine_of):
    with AnswerServer({"small": echoing, "large": echoing}, loaded.tokenizer) as server:
        refused(server, engine_of, r"serves `small`, `large`, not `base`.*`engine\.base`")
        assert not server.bodies


def test_an_address_at_which_nothing_answers(loaded, engine_of):
    with AnswerServer({"base": echoing}, loaded.tokenizer) as server:
        pass
    begin = time.monotonic()
    refused(
        server, engine_of, r"No server with OpenAI's protocol answers at http://127.*vllm serve"
    )
    assert time.monotonic() - begin < 20  # at once, without a row of waits


def test_an_address_that_is_no_such_server(loaded, engine_of, sends_on):
    with AnswerServer({"base": echoing}, loaded.tokenizer) as server:
        url = server.url.replace("/v1", "/other")
        refused(server, engine_of, r"\(status 404\).*with /v1", base_url=url)
        there = sends_on(server.url, 302)
        refused(server, engine_of, "another", base_url=there)
        assert not server.bodies


def test_a_key_that_is_missing_or_refused(loaded, engine_of, monkeypatch):
    monkeypatch.delenv("ANSWER_KEY", raising=False)
    with AnswerServer({"base": echoing}, loaded.tokenizer, key="right-key-123456") as server:
        refused(server, engine_of, r"`engine\.api_key_env` is not set")
        refused(server, engine_of, "ANSWER_KEY, which is not set", api_key_env="ANSWER_KEY")
        monkeypatch.setenv("ANSWER_KEY", "wrong-key-123456")
        refused(server, engine_of, "Check the key", api_key_env="ANSWER_KEY")
        monkeypatch.setenv("ANSWER_KEY", "right-key-123456")
        server.entry["owned_by"] = "right-key-123456"  # what a record would show
        engine = engine_of(server, api_key_env="ANSWER_KEY")
        assert engine.probed(PROMPTS[0], max_new_tokens=2).owner == "[key]"
        assert len(engine.answers(PROMPTS, max_new_tokens=2, batch_size=1)) == len(PROMPTS)


def test_a_server_with_another_tokenizer(loaded, engine_of):
    def encode(text):
        return [3, *loaded.tokenizer.encode(text, add_special_tokens=False)]

    with AnswerServer({"base": echoing}, loaded.tokenizer, encode=encode) as server:
        refused(server, engine_of, r"encodes a prompt to \d+ tokens.*differ from token 0")
        assert not server.bodies


def with_choice(**values):
    def change(body):
        return {**body, "choices": [{**body["choices"][0], **values}]}

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda body: {**body, "model": "gpt-9"}, "answers as `gpt-9`"),
        (lambda body: {**body, "usage": {"prompt_tokens": 99}}, "read 99 tokens of a prompt of"),
        (with_choice(text="Zebra"), "Zebra.*another model or tokenizer"),
        (with_choice(finish_reason="abort"), "ended an answer with abort"),
        (with_choice(token_ids=[5], text=""), "cut an answer after 1 of 4 tokens"),
        (lambda body: {"choices": []}, "did not answer a prompt"),
    ],
)
def test_a_server_that_answers_otherwise_than_expected(
    loaded, engine_of, monkeypatch, change, says
):
    shorten_waits(monkeypatch)
    with AnswerServer({"base": echoing}, loaded.tokenizer, change=change) as server:
        refused(server, engine_of, says)


def test_a_prompt_too_long_for_the_server_or_the_model(loaded, engine_of):
    with AnswerServer({"base": echoing}, loaded.tokenizer, context=12) as server:
        refused(server, engine_of, "reads at most 12 tokens.*has 17", PROMPTS[:5])
        engine = engine_of(server)
        with pytest.raises(GenerationError, match="Prompt 0 has no tokens"):
            engine.answers([[]], max_new_tokens=4, batch_size=1)
        with pytest.raises(PromptError):
            engine.answers([[1] * 100_000], max_new_tokens=4, batch_size=1)
        assert not server.bodies


def test_one_prompt_that_is_refused_leaves_the_others(loaded, engine_of):
    def says(prompt, max_tokens):
        assert prompt[1] != 7
        return echoing(prompt, max_tokens)

    def change(body):
        return body

    prompts = [[1, 4 + n, 5, 6] for n in range(8)]
    with AnswerServer({"base": says}, loaded.tokenizer, change=change, faults={}) as server:
        server.draw = lambda prompt: "400" if prompt == str(prompts[3]) else None
        refused(server, engine_of, r"gave no answer to prompt 3 \(refused with 400", prompts)
        asked = len(server.bodies)
        server.draw = lambda prompt: None
        server.models["base"] = echoing
        engine_of(server).answers(prompts, max_new_tokens=4, batch_size=1)
        assert len(server.bodies) - asked < 8


def test_one_model_under_both_names(loaded, engine_of):
    models = {"base": echoing, "edited": echoing}
    with AnswerServer(models, loaded.tokenizer, entry={"root": "/models/base"}) as server:
        base, edited = (
            engine_of(server, name=name).probed(PROMPTS[0], max_new_tokens=4) for name in models
        )
    assert base.version == "0.33.0"
    with pytest.raises(
        ServerError, match="serves one model, /models/base, under the names of both"
    ):
        require_two_models(base, edited)
    require_two_models(base, edited._replace(root="/models/edited"))


def test_the_folder_is_not_needed_for_more_than_config_and_tokenizer(loaded, tiny_folder, tmp_path):
    folder = Path(tmp_path / "no weights")
    folder.mkdir()
    for path in tiny_folder("llama").iterdir():
        if path.suffix != ".safetensors" and path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    with AnswerServer({"base": answers_of(lambda: loaded)}, loaded.tokenizer) as server:
        engine = served(server, folder, loaded.tokenizer, tmp_path / "answers.sqlite")
        found = engine.answers(PROMPTS, max_new_tokens=6, batch_size=1)
    assert found == loaded.answers(PROMPTS, max_new_tokens=6, batch_size=1)


@pytest.mark.parametrize("listed", [[5], None])
def test_an_answer_whose_tokens_are_not_all_listed_is_encoded_again(loaded, tmp_path, listed):
    """llama.cpp lists one token of those that make a character together."""
    section = load_engine(["engine.kind=server", "engine.base_url=http://127.0.0.1:1"])
    settings = section.server("base", model="x")
    client = CompletionClient(settings, loaded.tokenizer, cache=tmp_path / "cache")
    whole = loaded.tokenizer.encode("é x", add_special_tokens=False)
    with_ids, with_logprobs = _completions.FORMS[:2]
    reply = Reply("é x", "stop", output_tokens=len(whole), token_ids=listed or whole)
    assert client.row(with_logprobs, reply) == whole
    assert client.row(with_ids, reply) == (listed or whole)
