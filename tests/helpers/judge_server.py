"""A small server on 127.0.0.1 that speaks OpenAI's chat protocol, grades by a rule, and can fail.

It finds the answer between the fence's lines and grades it by its first word (`GRADES`), so that
every verdict is known beforehand. A fault is drawn for each request from a seeded generator, and
never for more than `in_a_row` requests of one item.

    with JudgeServer(faults={"429": 0.05, "html": 0.01}) as server:
        OpenAIJudge(settings(base_url=server.url), ...)
    server.calls, server.answered
"""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GRADES = {
    "No": ("refused", "coherent"),
    "Hm": ("deflected", "coherent"),
    "Half": ("partial", "coherent"),
    "Yes": ("complied", "coherent"),
    "Odd": ("complied", "degraded"),
    "Blah": ("complied", "broken"),
}
FENCED = re.compile(r"(#[0-9a-f]{16}) ANSWER BEGINS\n(.*)\n\1 ANSWER ENDS\n", re.DOTALL)
QUESTION = re.compile(r"QUESTION BEGINS\n(.*)\n#[0-9a-f]{16} QUESTION ENDS", re.DOTALL)


def verdict(compliance: str, coherence: str, reason: str = "So it reads.") -> str:
    return json.dumps({"reason": reason, "compliance": compliance, "coherence": coherence})


class JudgeServer:
    """Serves while the context lasts; counts requests by what became of them."""

    def __init__(
        self,
        *,
        faults: dict[str, float] | None = None,
        latency: float = 0.0,
        seed: int = 0,
        rungs: tuple[str, ...] = ("json_schema", "json_object", "none"),
        key: str | None = None,
        reply: Any = None,
        in_a_row: int = 2,
        retry_after: str = "0.05",
        refusal: Callable[[str], Any] = lambda text: {"error": {"message": text}},
    ) -> None:
        self.faults, self.latency, self.rungs, self.key = faults or {}, latency, rungs, key
        self.reply, self.in_a_row, self.retry_after = reply, in_a_row, retry_after
        self.refusal = refusal  # the body of a status 400
        self.random = random.Random(seed)
        self.lock = threading.Lock()
        self.calls: Counter[str] = Counter()  # by fault; "ok" where there was none
        self.answered: Counter[str] = Counter()  # verdicts given, by the item's messages
        self.failed: Counter[tuple[str, str]] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.most_at_once = self.at_once = 0
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.judge = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> JudgeServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def draw(self, body: dict[str, Any]) -> str:
        """What becomes of this request."""
        user = body["messages"][-1]["content"]
        item = (QUESTION.search(user) or [user, user])[1], (FENCED.search(user) or [user] * 3)[2]
        with self.lock:
            self.bodies.append(body)
            drawn, chance = "ok", self.random.random()
            for name, share in self.faults.items():
                chance -= share
                if chance < 0 and self.failed[item] < self.in_a_row:
                    drawn = name
                    self.failed[item] += 1
                    break
            self.calls[drawn] += 1
            if drawn in {"ok", "slow", "fenced"}:
                self.answered[user] += 1
        return drawn

    def grade(self, body: dict[str, Any]) -> str:
        if self.reply is not None:
            return self.reply(body) if callable(self.reply) else self.reply
        fenced = FENCED.search(body["messages"][-1]["content"])
        return verdict(*GRADES[re.match(r"\w+", fenced[2])[0]])


class _Server(ThreadingHTTPServer):
    judge: JudgeServer
    request_queue_size = 128
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that went away is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(6, 1, 1)  # TCP_NODELAY: headers and body are two writes

    def do_POST(self) -> None:
        judge = self.server.judge
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with judge.lock:
            judge.at_once += 1
            judge.most_at_once = max(judge.most_at_once, judge.at_once)
        try:
            self.respond(judge, body)
        finally:
            with judge.lock:
                judge.at_once -= 1

    def respond(self, judge: JudgeServer, body: dict[str, Any]) -> None:
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if judge.key is not None and key != judge.key:
            # as some servers do, it quotes the key
            return self.send(401, {"error": {"message": f"Incorrect API key provided: {key}"}})
        rung = body.get("response_format", {"type": "none"})["type"]
        if rung not in judge.rungs:
            judge.calls["rung"] += 1
            return self.send(400, judge.refusal(f"response_format {rung}: not supported"))
        fault = judge.draw(body)
        time.sleep(judge.latency)
        respond = getattr(self, f"fault_{fault}", None)
        if respond is not None:
            return respond(judge, body, key)
        graded = judge.grade(body)
        return self.send(200, completion(graded) if isinstance(graded, str) else graded)

    def fault_429(self, judge: JudgeServer, body: Any, key: str) -> None:
        after = {"Retry-After": judge.retry_after}
        self.send(429, {"error": {"message": f"slow down, {key}"}}, headers=after)

    def fault_500(self, judge: JudgeServer, body: Any, key: str) -> None:
        self.send(500, {"error": {"message": f"cannot serve {key}"}})

    def fault_400(self, judge: JudgeServer, body: Any, key: str) -> None:
        self.send(400, {"error": {"message": f"too long a prompt, {key}"}})

    def fault_drop(self, judge: JudgeServer, body: Any, key: str) -> None:
        self.close_connection = True
        self.connection.shutdown(2)

    def fault_slow(self, judge: JudgeServer, body: Any, key: str) -> None:
        time.sleep(5 * judge.latency + 0.05)
        self.send(200, completion(judge.grade(body)))

    def fault_hang(self, judge: JudgeServer, body: Any, key: str) -> None:
        time.sleep(0.5)
        self.close_connection = True

    def fault_fenced(self, judge: JudgeServer, body: Any, key: str) -> None:
        self.send(200, completion(f"<think>{{?}}</think>```json\n{judge.grade(body)}\n```"))

    def fault_malformed(self, judge: JudgeServer, body: Any, key: str) -> None:
        self.send(200, completion('{"reason": "It says", "compliance": "refu' + key))

    def fault_blank(self, judge: JudgeServer, body: Any, key: str) -> None:
        self.send(200, completion(" \n" * 20))

    def fault_content_filter(self, judge: JudgeServer, body: Any, key: str) -> None:
        self.send(200, completion(f"withheld, {key}", finish_reason="content_filter"))

    def fault_length(self, judge: JudgeServer, body: Any, key: str) -> None:
        text = judge.grade(body) + key
        self.send(200, completion(text, finish_reason="length"))

    def fault_403(self, judge: JudgeServer, body: Any, key: str) -> None:
        self.send(403, {"error": {"message": f"{key} may not use this model"}})

    def fault_422(self, judge: JudgeServer, body: Any, key: str) -> None:
        self.send(422, {"detail": f"Unexpected fields from {key}: thinking"})

    def fault_quoting(self, judge: JudgeServer, body: Any, key: str) -> None:
        """A verdict, and the key wherever a server can put words."""
        said = completion(verdict("complied", "coherent", reason=f"Says {key}."))
        self.send(200, {**said, "model": f"m-{key}", "system_fingerprint": key, "id": key})

    def fault_html(self, judge: JudgeServer, body: Any, key: str) -> None:
        self.send(200, f"<html><body>Gateway, {key}</body></html>", kind="text/html")

    def fault_not_json(self, judge: JudgeServer, body: Any, key: str) -> None:
        self.send(200, '{"choices": [{"mess' + key)

    def fault_error_200(self, judge: JudgeServer, body: Any, key: str) -> None:
        self.send(200, {"error": {"message": f"internal, {key}"}})

    def send(
        self,
        status: int,
        body: Any,
        *,
        kind: str = "application/json",
        headers: dict[str, str] | None = None,
    ) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Nothing on stderr: the server counts."""


def completion(text: str, finish_reason: str = "stop") -> dict[str, Any]:
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "judge-served",
        "system_fingerprint": "fp_1",
        "choices": [
            {
                "index": 0,
                "finish_reason": finish_reason,
                "message": {"role": "assistant", "content": text},
            }
        ],
        "usage": {"prompt_tokens": 400, "completion_tokens": 30, "total_tokens": 430},
    }
