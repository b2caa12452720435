"""After every failure of a judging run, the key is in no file of OUT, no log and no traceback."""

from __future__ import annotations

import base64
import logging
import os
import traceback

import pytest
from click.testing import CliRunner

from abliterator.cli import main
from abliterator.server import ReplyCache
from tests.helpers.judge_server import JudgeServer, completion, verdict
from tests.server.seams import CLIENT, shorten_waits

KEY = "sk-Quite0Secret9TestKey"
SAID = verdict("complied", "coherent")
# The server quotes the key in each of these but "drop", "hang" and "blank", where it says nothing.
FAULTS = ["429", "500", "400", "422", "403", "drop", "hang", "malformed", "fenced", "blank", "html"]
FAULTS += ["not_json", "error_200", "content_filter", "length", "quoting"]
LIMITS = {
    "calls": ["judge.max_calls=2"],
    "dollars": ["judge.max_usd=0.0000001", "judge.prices.input=1", "judge.prices.output=1"],
    "time": ["judge.time_limit=0.000001"],
}
LOGGERS = ["openai", "httpx", "httpx2", "httpcore", "httpcore2", "asyncio", "abliterator"]


@pytest.fixture(scope="module")
def answered(tmp_path_factory, tiny_folder):
    """(recipe, OUT): a run that has only to be judged."""
    folder = tmp_path_factory.mktemp("secrets")
    (folder / "target.txt").write_text("\n".join(f"What is {x} like?" for x in "abcdefghijkl"))
    (folder / "neutral.txt").write_text("\n".join(f"Tell me of {x}." for x in "abcdefghijkl"))
    (folder / "tiny.yaml").write_text(
        f"model: {tiny_folder()}\nlayers: [2]\nk: 1\nrollouts: {{max_new_tokens: 3}}\n"
        "prompts: {target: {path: target.txt}, neutral: {path: neutral.txt}}\n"
    )
    out = folder / "out"
    command = ["rollouts", str(folder / "tiny.yaml"), "--out", str(out), "--device", "cpu"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    return folder / "tiny.yaml", out


@pytest.fixture
def everything(monkeypatch, caplog):
    """Loopback without a proxy, the key in the environment, and every logger at DEBUG."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    shorten_waits(monkeypatch, longest=0.02)
    caplog.set_level(logging.DEBUG)
    for name in LOGGERS:
        caplog.set_level(logging.DEBUG, logger=name)
    return caplog


def judge(answered, url, *more, model="m"):
    """Exit code, and all that a run of the command leaves behind for anybody to read.

    A server may get the port of an earlier one, whose replies are in the cache: where every answer
    is to be asked for, `model` has a name of its own.
    """
    recipe, out = answered
    command = ["judge", str(recipe), "--out", str(out), "--force", "--device", "cpu"]
    chosen = [
        "kind=openai",
        f"base_url={url}",
        f"model={model}",
        "api_key_env=JUDGE_KEY",
        "retries=1",
    ]
    for value in [f"judge.{setting}" for setting in chosen] + list(more):
        command += ["--set", value]
    done = CliRunner().invoke(main, command)
    seen = done.output + "".join(traceback.format_exception(done.exception))
    files = [path for path in out.rglob("*") if path.is_file()]
    assert "judge.sqlite" in {path.name for path in files}
    return done.exit_code, seen + "".join(p.read_bytes().decode(errors="replace") for p in files)


@pytest.mark.parametrize("fault", FAULTS)
def test_after_a_failure_of_the_server(fault, answered, everything):
    timeout = "judge.timeout=0.2" if fault == "hang" else "judge.timeout=5"
    with JudgeServer(faults={fault: 1.0}, in_a_row=999, key=KEY, reply=SAID) as server:
        _, seen = judge(answered, server.url, timeout)
        assert server.calls[fault]
    assert KEY not in seen + everything.text


def test_after_a_refused_key(answered, everything):
    with JudgeServer(key="another") as server:
        code, seen = judge(answered, server.url)
    assert code == 1
    assert "401" in seen
    assert "[key]" in seen
    assert KEY not in seen + everything.text


@pytest.mark.parametrize("limit", LIMITS)
def test_after_a_limit(limit, answered, everything):
    with JudgeServer(key=KEY, reply=SAID) as server:
        code, seen = judge(answered, server.url, *LIMITS[limit], model=limit)
    assert code == 1
    assert KEY not in seen + everything.text


def test_after_a_server_that_is_not_there(answered, everything):
    with JudgeServer() as server:
        url = server.url
    code, seen = judge(answered, url)
    assert code == 1
    assert KEY not in seen + everything.text


@pytest.mark.parametrize("where", ["_reply", "_format"])
def test_after_a_bug_of_ours(where, answered, everything, monkeypatch):
    """It keeps its traceback, which has no key in it."""

    def broken(*_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(CLIENT, where, broken)
    with JudgeServer(key=KEY, reply=SAID) as server:
        code, seen = judge(answered, server.url)
    assert code == 1
    assert "ZeroDivisionError: a bug" in seen, seen[:1500]
    assert KEY not in seen + everything.text


def test_after_a_full_disk(answered, everything, monkeypatch):
    def full(*_, **__):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(ReplyCache, "put", full)
    with JudgeServer(key=KEY, reply=SAID) as server:
        code, seen = judge(answered, server.url)
    assert code == 1
    assert KEY not in seen + everything.text


def test_no_form_of_the_key_reaches_the_verdicts(answered, everything):
    coded = base64.b64encode(KEY.encode()).decode()
    said = verdict("complied", "coherent", reason=f"Says {coded}.")
    with JudgeServer(key=KEY, reply=lambda _: {**completion(said), "model": coded}) as server:
        code, seen = judge(answered, server.url)
    assert code == 0
    assert coded not in seen + everything.text
