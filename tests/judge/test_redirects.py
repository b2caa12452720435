"""A server that sends questions on: within itself that is followed, to another never."""

from __future__ import annotations

import pytest

from abliterator.errors import ServerError
from abliterator.server import origin, warn_of_plain_http
from tests.helpers.judge_server import JudgeServer
from tests.judge.asking import KEY, answers, judged


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_another_server_gets_neither_key_nor_answers(status, sends_on, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with JudgeServer() as other:
        url = sends_on(f"{other.url}/chat/completions", status)
        with pytest.raises(ServerError, match=r"sends questions on to another.*judge\.base_url"):
            judged(url, answers(2), tmp_path, api_key_env="JUDGE_KEY")
        assert not other.bodies


def test_a_relative_redirect_stays_with_the_server(tmp_path, monkeypatch):
    with JudgeServer() as server:
        handler = server._server.RequestHandlerClass
        once = []

        def respond(self, judge, body):
            if self.path.endswith("/moved"):
                return original(self, judge, body)
            once.append(self.path)
            return self.send(307, "", headers={"Location": "/v1/moved"})

        original = handler.respond
        monkeypatch.setattr(handler, "respond", respond)
        found, _ = judged(server, answers(1), tmp_path)
    assert once
    assert found[0].is_scored


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("https://a.example/v1", "https://A.example:443/x", True),
        ("http://a.example/v1", "http://a.example:80/", True),
        ("https://a.example", "http://a.example", False),
        ("https://a.example", "https://a.example:8443", False),
        ("https://a.example", "https://a.example.evil.test", False),
        ("https://a.example", "https://user@a.example/", True),
    ],
)
def test_origins(one, other, same):
    assert (origin(one) == origin(other)) is same


@pytest.mark.parametrize(
    ("url", "variable", "warned"),
    [
        ("http://judge.example/v1", "K", True),
        ("http://192.168.1.7:8000/v1", "K", True),
        ("http://[2001:db8::1]/v1", "K", True),
        ("http://judge.example/v1", None, False),
        ("https://judge.example/v1", "K", False),
        ("http://localhost:8000", "K", False),
        ("http://127.0.0.9:8000", "K", False),
        ("http://[::1]:8000", "K", False),
    ],
)
def test_a_key_over_plain_http_is_warned_of(url, variable, warned):
    assert bool(warn_of_plain_http(url, variable, name="judge.base_url")) is warned
