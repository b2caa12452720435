"""Waiting, concurrency, and limits of time, calls and money."""

from __future__ import annotations

import asyncio

import pytest

from abliterator.errors import JudgeError, ServerError
from abliterator.recipe import Prices
from abliterator.server import ReplyCache
from tests.helpers.judge_server import JudgeServer
from tests.judge.asking import EXPECTED, KEY, answers, grades, judged


def test_a_long_retry_after_is_waited_for(tmp_path, monkeypatch):
    slept = []

    async def sleep(seconds, *_):
        slept.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    with JudgeServer(faults={"429": 1.0}, in_a_row=1, retry_after="200") as server:
        found, _ = judged(server, answers(1), tmp_path)
    assert grades(found) == [EXPECTED["No"]]
    assert max(slept) == 200


def test_a_retry_after_date_is_understood(tmp_path):
    past = "Wed, 21 Oct 2015 07:28:00 GMT"
    with JudgeServer(faults={"429": 1.0}, in_a_row=1, retry_after=past) as server:
        found, _ = judged(server, answers(1), tmp_path)
    assert found[0].is_scored


def test_waiting_past_the_time_limit_stops_and_keeps_what_was_judged(tmp_path):
    with (
        JudgeServer(faults={"429": 0.1}, retry_after="900", in_a_row=1) as server,
        pytest.raises(JudgeError, match=r"time_limit.* of 60 distinct answers .*kept"),
    ):
        judged(server, answers(60), tmp_path, time_limit=60.0)
    with ReplyCache(tmp_path / "judge.sqlite") as cache:
        kept = cache._db.execute("SELECT count(*) FROM replies").fetchone()[0]
    assert kept == sum(server.answered.values()) > 0


def test_a_server_that_is_down_is_named_soon(tmp_path):
    with JudgeServer() as server:
        url = server.url
    with pytest.raises(ServerError, match="failed 24 calls in a row"):
        judged(url, answers(50), tmp_path)


def test_one_item_that_always_fails_is_unscored_alone(tmp_path):
    with JudgeServer(faults={"400": 0.05}, in_a_row=99) as server:
        found, _ = judged(server, answers(100), tmp_path)
    lost = [judgement for judgement in found if not judgement.is_scored]
    assert len(lost) == server.calls["400"] > 0
    assert "refused with 400" in lost[0].reasons[0]
    assert "too long a prompt" in lost[0].reasons[0]


def test_a_wrong_key_stops_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with (
        JudgeServer(key="another") as server,
        pytest.raises(ServerError, match=r"401.*\$JUDGE_KEY") as caught,
    ):
        judged(server, answers(50), tmp_path, api_key_env="JUDGE_KEY")
    assert KEY not in str(caught.value)


def test_a_missing_key_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ServerError, match="JUDGE_KEY, which is not set"):
        judged("http://127.0.0.1:9", answers(1), tmp_path, api_key_env="JUDGE_KEY")


def test_concurrency_is_kept(tmp_path):
    with JudgeServer(latency=0.01) as server:
        judged(server, answers(60), tmp_path, concurrency=5)
    assert server.most_at_once <= 5


def test_within_a_running_event_loop(tmp_path):
    """As in a notebook."""

    async def cell(server):
        return judged(server, answers(3), tmp_path)[0]

    with JudgeServer() as server:
        found = asyncio.run(cell(server))
    assert all(judgement.is_scored for judgement in found)


def test_calls_stop_at_the_limit_and_go_on_from_there(tmp_path):
    with JudgeServer() as server:
        with pytest.raises(JudgeError, match=r"max_calls` of 10 is reached\. 10 of 30"):
            judged(server, answers(30), tmp_path, max_calls=10)
        assert server.calls["ok"] == 10
        found, _ = judged(server, answers(30), tmp_path, max_calls=30)
        assert server.calls["ok"] == 30
    assert all(judgement.is_scored for judgement in found)


def test_dollars_stop_before_the_limit(tmp_path):
    prices = Prices(input=1000.0, output=1000.0)
    with JudgeServer() as server:
        with pytest.raises(JudgeError, match="max_usd"):
            judged(
                server,
                answers(30),
                tmp_path,
                prices=prices,
                max_usd=5.0,
                parameters={"max_tokens": 64},
            )
        spent = 0.43 * server.calls["ok"]  # 430 tokens a call, as the server says
        assert 3.0 < spent <= 5.0
        _, identity = judged(
            server, answers(30), tmp_path, prices=prices, parameters={"max_tokens": 64}
        )
    assert identity.usage == {"calls": 30, "invalid": 0, "usd": pytest.approx(0.43 * 30)}
