"""A small server on 127.0.0.1 that completes text with a tiny model, as `vllm serve` would.

It speaks what lm-eval's client asks: GET /v1/models, and POST /v1/completions with prompts as token
ids, greedy, either `echo` with `logprobs` of the prompt, or a completion up to a stop text.

    with CompletionsServer(folder) as server:
        run(folder, tasks, engine=server_engine(server.url))
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class CompletionsServer:
    """Serves the checkpoint in `folder` while the context lasts; `echoes` false: as many do."""

    def __init__(self, folder: Path, *, echoes: bool = True) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.echoes = echoes
        self.asked: list[dict] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def __enter__(self) -> CompletionsServer:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def complete(self, asked: dict) -> dict:
        self.asked.append(asked)
        prompts = asked["prompt"]
        if isinstance(prompts, str):
            prompts = [self.tokenizer.encode(prompts)]
        choices = []
        for index, ids in enumerate(prompts):
            with torch.inference_mode():
                choice = self._scored(ids) if asked.get("echo") else self._continued(ids, asked)
            choices.append({"index": index, **choice})
        return {"choices": choices[::-1]}  # in any order: the index counts

    def _scored(self, ids: list[int]) -> dict:
        logprobs = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        likeliest = logprobs.argmax(-1).tolist()
        following = [*ids[1:], likeliest[-1]]
        tokens = [None, *(logprobs[i, token].item() for i, token in enumerate(following))]
        top = [None, *({str(t): logprobs[i, t].item()} for i, t in enumerate(likeliest))]
        first = 0 if self.echoes else len(ids)
        return {
            "text": self.tokenizer.decode([*ids, likeliest[-1]][first:]),
            "logprobs": {"token_logprobs": tokens[first:], "top_logprobs": top[first:]},
        }

    def _continued(self, ids: list[int], asked: dict) -> dict:
        text, said = "", []
        while len(said) < asked["max_tokens"]:
            token = self.model(torch.tensor([[*ids, *said]])).logits[0, -1].argmax().item()
            if token == self.tokenizer.eos_token_id:
                break
            said.append(token)
            text = self.tokenizer.decode(said, skip_special_tokens=True)
            ends = [text.find(stop) for stop in asked["stop"] if stop in text]
            if ends:
                text = text[: min(ends)]
                break
        return {"text": text}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer({"data": [{"id": "tiny"}]} if self.path == "/v1/models" else None)

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self._answer(server.complete(asked) if self.path == "/v1/completions" else None)

            def _answer(self, found: dict | None) -> None:
                body = json.dumps(found).encode()
                self.send_response(404 if found is None else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        return Handler
