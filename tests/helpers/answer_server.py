"""A server on 127.0.0.1 that answers /v1/completions as vLLM does, or as plainer servers, or fails.

What a model answers is a function of the prompt's token ids. Faults are drawn for each request from
a seeded generator, and never for more than two requests of one prompt.

    with AnswerServer({"base": answers_of(loaded), "edited": ...}, loaded.tokenizer) as server:
        CompletionClient(settings(base_url=server.url), ...)
    server.answered
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from abliterator.engines import Engine

Says = Callable[[list[int], int], tuple[list[int], str]]  # prompt, max_tokens: tokens, reason
Kind = Literal["vllm", "llama.cpp", "text out", "text"]


def answers_of(engine: Callable[[], Engine]) -> Says:
    """What an engine answers, with its stop token, one prompt at a time."""
    lock = threading.Lock()

    def says(prompt: list[int], max_tokens: int) -> tuple[list[int], str]:
        with lock:
            model = engine()
            answer = model.answers([prompt], max_new_tokens=max_tokens, batch_size=1)[0]
        stop = [model.stop_ids[0]] if answer.finish_reason == "stop" else []
        return [*answer.token_ids, *stop], answer.finish_reason

    return says


def echoing(prompt: Sequence[int], max_tokens: int) -> tuple[list[int], str]:
    """The prompt's last tokens, for tests of everything but models."""
    return list(prompt)[-max_tokens:], "length"


class AnswerServer:
    """Serves while the context lasts; counts what was asked."""

    def __init__(
        self,
        models: dict[str, Says],
        tokenizer: Any,
        *,
        kind: Kind = "vllm",
        latency: float = 0.0,
        faults: dict[str, float] | None = None,
        key: str | None = None,
        context: int = 4096,
        entry: dict[str, Any] | None = None,
        change: Callable[[dict[str, Any]], Any] = lambda body: body,
        encode: Callable[[str], list[int]] | None = None,
    ) -> None:
        self.models, self.tokenizer, self.kind = models, tokenizer, kind
        self.latency, self.faults, self.key, self.context = latency, faults or {}, key, context
        self.entry = entry or {}  # further fields of the entries of /v1/models
        self.change = change  # of the body of an answer
        self.encode = encode or (lambda text: tokenizer.encode(text, add_special_tokens=False))
        self.random, self.lock = random.Random(0), threading.Lock()
        self.bodies: list[dict[str, Any]] = []
        self.answered: Counter[tuple[str, str]] = Counter()  # by model and prompt
        self.failed: Counter[str] = Counter()
        self.at_once = self.most_at_once = 0
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.answers = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> AnswerServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    @property
    def prompts(self) -> Counter[str]:
        """How often each prompt was answered in full, probes left out."""
        return Counter({prompt: n for (_, prompt), n in self.answered.items()})

    def draw(self, prompt: str) -> str | None:
        """The fault of this request, if any."""
        with self.lock:
            chance = self.random.random()
            for name, share in self.faults.items():
                chance -= share
                if chance < 0 and self.failed[prompt] < 2:
                    self.failed[prompt] += 1
                    return name
        return None

    def complete(self, asked: dict[str, Any]) -> tuple[int, Any]:
        prompt = asked["prompt"]
        extras = {"return_token_ids", "logprobs", "stop_token_ids", "skip_special_tokens"}
        if self.kind == "text" and (not isinstance(prompt, str) or extras & set(asked)):
            return 422, {"detail": "prompt must be a string, without unexpected fields"}
        if asked["model"] not in self.models:
            return 404, {"error": {"message": f"The model {asked['model']} does not exist."}}
        ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        tokens, reason = self.models[asked["model"]](ids, asked["max_tokens"])
        special = not asked.get("skip_special_tokens", True)
        ends = reason == "stop"
        text = self.tokenizer.decode(
            tokens[:-1] if ends else tokens, skip_special_tokens=not special
        )
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": reason}
        if self.kind == "vllm" and asked.get("return_token_ids"):
            choice |= {"token_ids": tokens, "prompt_token_ids": ids}
        elif self.kind == "llama.cpp" and "logprobs" in asked:
            choice["logprobs"] = {"content": [{"id": t, "logprob": -0.1} for t in tokens]}
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(tokens)}
        with self.lock:
            self.answered[asked["model"], str(prompt)] += 1
        return 200, self.change({"model": asked["model"], "choices": [choice], "usage": usage})


class _Server(ThreadingHTTPServer):
    answers: AnswerServer
    request_queue_size = 512
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that went away is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(6, 1, 1)  # TCP_NODELAY: headers and body are two writes

    def do_GET(self) -> None:
        server = self.server.answers
        if self._is_refused(server):
            return
        if self.path == "/v1/models":
            limits = {"max_model_len": server.context, "owned_by": server.kind, **server.entry}
            self.send(200, {"data": [{"id": name, **limits} for name in server.models]})
        elif self.path == "/version" and server.kind == "vllm":
            self.send(200, {"version": "0.33.0"})
        else:
            self.send(404, {"error": "not found"})

    def do_POST(self) -> None:
        server = self.server.answers
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._is_refused(server):
            return
        if self.path == "/tokenize" and server.kind in ("vllm", "llama.cpp"):
            self.send(200, {"tokens": server.encode(body["prompt"])})
        elif self.path == "/v1/completions":
            self._complete(server, body)
        else:
            self.send(404, {"error": "not found"})

    def _complete(self, server: AnswerServer, body: dict[str, Any]) -> None:
        with server.lock:
            server.bodies.append(body)
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            time.sleep(server.latency)
            fault = server.draw(str(body["prompt"]))
            if fault is None:
                self.send(*server.complete(body))
            elif fault == "drop":
                self.close_connection = True
                self.connection.shutdown(2)
            elif fault == "html":
                self.send(200, "<html>Gateway</html>", kind="text/html")
            else:
                self.send(int(fault), {"error": {"message": "not now"}})
        finally:
            with server.lock:
                server.at_once -= 1

    def _is_refused(self, server: AnswerServer) -> bool:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if server.key is None or given == server.key:
            return False
        self.send(401, {"error": {"message": f"Incorrect API key provided: {given}"}})
        return True

    def send(self, status: int, body: Any, kind: str = "application/json") -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Nothing on stderr: the server counts."""
