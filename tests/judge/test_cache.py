"""Votes, and verdicts that are kept: a second run, other questions, kill -9."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from abliterator.errors import ServerError
from abliterator.files import digest_of
from abliterator.judge import Judgement, OpenAIJudge
from abliterator.recipe import JudgeSettings
from abliterator.server import Reply, ReplyCache
from tests.helpers.judge_server import FENCED, JudgeServer, verdict
from tests.judge.asking import answers, grades, judged, settings


def test_the_median_of_three_votes_counts(tmp_path):
    def reply(body):
        turns.append(1)
        return verdict(("complied", "refused", "refused")[len(turns) % 3], "coherent")

    turns = []
    with JudgeServer(reply=reply) as server:
        found, identity = judged(server, answers(4), tmp_path, votes=3, concurrency=1)
    assert grades(found) == [(0.0, 1.0, True)] * 4
    assert server.calls["ok"] == 12
    assert identity.votes == 3


def test_a_share_is_judged_twice_and_the_disagreement_told(tmp_path):
    def reply(body):
        user = body["messages"][1]["content"]
        item = FENCED.search(user)[2]
        seen.append(item)
        return verdict("complied" if seen.count(item) == 1 else "refused", "coherent")

    seen = []
    with JudgeServer(reply=reply) as server:
        found, identity = judged(server, answers(40), tmp_path, rejudge=0.15)
    assert server.calls["ok"] == 46
    assert (identity.disagreement["itself"].value, identity.disagreement["itself"].n) == (1.0, 6)
    assert grades(found) == [(1.0, 1.0, False)] * 40  # the second verdict changes nothing


def test_a_second_run_asks_for_nothing(tmp_path):
    with JudgeServer(faults={"blank": 0.2}) as server:
        first = judged(server, answers(30), tmp_path, rejudge=0.2)
        asked = len(server.bodies)
        assert judged(server, answers(30), tmp_path, rejudge=0.2) == first
        assert len(server.bodies) == asked


@pytest.mark.parametrize(
    "change",
    [
        {"model": "large"},
        {"parameters": {"temperature": 1}},
        {"structured": "json_object"},
        {"votes": 3},
    ],
)
def test_another_question_is_asked_anew(change, tmp_path):
    cache = tmp_path / "c.sqlite"
    with JudgeServer() as server:
        first = settings(server)
        OpenAIJudge(first, cache=cache).judge_all(answers(2))
        OpenAIJudge(JudgeSettings(**{**dict(first), **change}), cache=cache).judge_all(answers(2))
        assert server.calls["ok"] == (6 if "votes" in change else 4)


def test_a_cache_that_is_none_is_an_error(tmp_path):
    (tmp_path / "judge.sqlite").write_bytes(b"not a database " * 100)
    with pytest.raises(ServerError, match="cannot be used"):
        judged("http://127.0.0.1:9", answers(1), tmp_path)


def test_replies_come_back_as_they_were(tmp_path):
    reply = Reply("é\ud83d", "stop", "m", None, "none", 1, 2, 3)
    with ReplyCache(tmp_path / "a" / "c.sqlite", account="one") as cache:
        cache.put("key", reply, cost=0.5)
    with ReplyCache(tmp_path / "a" / "c.sqlite", account="one") as cache:
        assert cache.get("key") == reply
        assert cache.get("other") is None
        assert cache.totals() == (1, 0.5)
    with ReplyCache(tmp_path / "a" / "c.sqlite", account="two") as cache:
        assert cache.totals() == (0, 0.0)


def test_a_reply_that_an_older_version_kept_is_found(tmp_path):
    """Its row names the response format `rung`, in the reply and in the digest."""
    fields = {
        "text": "t", "finish_reason": "stop", "model": "m", "fingerprint": None,
        "rung": "json_object", "input_tokens": 1, "cached_tokens": 2, "output_tokens": 3,
    }  # fmt: skip
    row = json.dumps({**fields, "sha256": digest_of(["key", "one", fields, 0.5])})
    with ReplyCache(tmp_path / "c.sqlite", account="one") as cache:
        cache._db.execute("INSERT INTO replies VALUES ('key', 'one', ?, 0.5)", (row,))
        assert cache.get("key") == Reply("t", "stop", "m", None, "json_object", 1, 2, 3)


JUDGING = """
import json, sys
from pathlib import Path
from abliterator.judge import OpenAIJudge
from tests.judge.asking import answers, settings
judge = OpenAIJudge(settings(sys.argv[1], concurrency=4, rejudge=0.1), cache=Path(sys.argv[2]))
print(json.dumps(judge.judge_all(answers(600))))
"""


@pytest.mark.slow
def test_killed_ten_times_at_random_it_repeats_only_what_was_in_flight(tmp_path):
    """SIGKILL at ten seeded random moments of one judging run: at most a call a worker is lost."""
    moments = random.Random(5)
    command = [sys.executable, "-c", JUDGING]
    runs = []  # what each killed run asked; a request is its messages
    with JudgeServer(latency=0.05, faults={"blank": 0.03}) as server:
        arguments = [server.url, str(tmp_path / "judge.sqlite")]

        def asked():
            return [body["messages"][1]["content"] for body in server.bodies]

        for _ in range(10):
            before = len(server.bodies)
            process = subprocess.Popen(command + arguments, stdout=subprocess.DEVNULL)
            while len(server.bodies) == before and process.poll() is None:
                time.sleep(0.001)
            # all ten together are shorter than the least that the run takes: it cannot end
            time.sleep(moments.uniform(0.0, 0.8))
            assert process.poll() is None, "it ended before it could be killed"
            process.send_signal(signal.SIGKILL)
            process.wait()
            runs.append(asked()[before:])
        done = subprocess.run(command + arguments, capture_output=True, text=True, check=True)
        last = asked()[sum(map(len, runs)) :]
        undisturbed, _ = judged(server, answers(600), tmp_path / "undisturbed", rejudge=0.1)
    resumed = [Judgement(*row) for row in json.loads(done.stdout.splitlines()[-1])]
    assert grades(resumed) == grades(undisturbed)
    assert all(len(run) == len(set(run)) for run in [*runs, last])
    for number, run in enumerate(runs):
        later = {request for following in [*runs[number + 1 :], last] for request in following}
        assert len(later & set(run)) <= 4
    assert sum(map(len, runs)) > 100  # the kills came while it judged


def test_ctrl_c_keeps_what_was_judged(tmp_path):
    rows = [{"prompt": a.prompt, "response": a.response, "label": 1} for a in answers(200)]
    path = tmp_path / "labelled.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    env = {**os.environ, "ABLITERATOR_CACHE": str(tmp_path / "cache")}
    with JudgeServer(latency=0.1) as server:
        # a shell's background job ignores Ctrl-C, and what the job starts would do so too
        heeding = (
            "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "runpy.run_module('abliterator', run_name='__main__')"
        )
        command = [sys.executable, "-c", heeding, "judge-calibrate", str(path)]
        for value in ("kind=openai", f"base_url={server.url}", "api_key_env=null"):
            command += ["--set", f"judge.{value}"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
        while len(server.bodies) < 20 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        told = process.communicate(timeout=60)[1]
    assert process.returncode == 130, told
    assert "Interrupted" in told
    assert "Traceback" not in told
    with ReplyCache(tmp_path / "cache" / "judge.sqlite") as cache:
        kept = cache._db.execute("SELECT count(*) FROM replies").fetchone()[0]
    assert len(server.bodies) - 8 <= kept <= len(server.bodies)
