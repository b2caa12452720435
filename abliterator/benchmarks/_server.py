"""A completions server as lm-eval's model; it must return log-probabilities of the prompt."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from abliterator.errors import BenchmarkError
from abliterator.server import origin

_PROBE_SECONDS = 10
_PROBE = "One two three four five."


def require_server(url: str | None, model: str | None = None, *, key: str | None = None) -> None:
    """Checks that a server answers, and that it returns log-probabilities of the prompt.

    A server that accepts `echo` and ignores it would give every choice the log-likelihood 0.

    Args:
        url: its address, up to and with /v1.
        model: name of the model; left out, the first that it lists.
        key: sent to it; left out, that in OPENAI_API_KEY.

    Raises:
        BenchmarkError: if it does not; the message says what to start.
    """
    model = model or served_model(url, key=key)
    payload = {
        "model": model, "prompt": _PROBE, "max_tokens": 1, "temperature": 0, "echo": True,
        "logprobs": 1,
    }  # fmt: skip
    try:
        choice = _json_of(url, "completions", payload, key=key)["choices"][0]
        values = choice["logprobs"]["token_logprobs"]
        echoes = len(values) > 2 and all(isinstance(value, float) for value in values[1:-1])
    except (OSError, ValueError, LookupError, TypeError):
        echoes = False
    if not echoes:
        raise BenchmarkError(
            f"The server at {url} does not tell log-probabilities of the prompt (`echo` with "
            "`logprobs` on /v1/completions), without which multiple choice cannot be scored. "
            "`vllm serve` and SGLang do; or leave benchmarks to transformers: "
            "`benchmarks.engine.kind: transformers`, or `engine.benchmarks: false`."
        )


def served_model(url: str | None, *, key: str | None = None) -> str:
    """The name under which a server serves its model.

    Raises:
        BenchmarkError: if no server answers at the url.
    """
    try:
        return str(_json_of(url, "models", key=key)["data"][0]["id"])
    except (URLError, OSError, ValueError, LookupError, TypeError) as error:
        raise BenchmarkError(
            f"No OpenAI-compatible server answers at {url or 'an empty url'} ({error}). Benchmarks "
            "on servers need one for the base and one for the edited checkpoint; start them, for "
            "example with `vllm serve FOLDER --port 8000`, and give their addresses as "
            "`benchmarks.engine: {kind: server, base_url: http://localhost:8000/v1, edited_url: "
            "...}`."
        ) from error


def open_server(
    url: str | None, model: str | None, *, tokenizer: Path, options: Mapping[str, Any]
) -> Any:
    """lm-eval's client for the server at `url`, with the tokenizer of the checkpoint it serves.

    lm-eval's client adds no BOS token, though its own in-process model does where the tokenizer
    would; here both read the same tokens.
    """
    from lm_eval.api.registry import get_model

    settings = {
        "base_url": f"{_address(url)}/completions",
        "tokenizer": str(tokenizer),
        "tokenizer_backend": "huggingface",
        **options,
    }
    client = get_model("local-completions")(model=model or served_model(url), **settings)
    if options.get("add_bos_token") is None:
        client.add_bos_token = None
        client.tok_encode = partial(_encode, client.tokenizer)
    return client


def _encode(
    tokenizer: Any,
    text: str | tuple[str, ...],
    *,
    add_special_tokens: bool | None = None,
    left_truncate_len: int | None = None,
    **_: Any,
) -> Any:
    """Token ids of one or several texts as HFLM encodes them: BOS is added unless it is there."""
    if not isinstance(text, str):
        return [_encode(tokenizer, item, add_special_tokens=add_special_tokens) for item in text]
    if add_special_tokens is None:
        start = tokenizer.bos_token
        add_special_tokens = not (start and text.startswith(start))
    ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return ids[-left_truncate_len:] if left_truncate_len else ids


def _json_of(
    url: str | None, path: str, payload: Mapping[str, Any] | None = None, *, key: str | None
) -> Any:
    """The JSON of the server's answer; without a key, that which lm-eval sends."""
    key = os.environ.get("OPENAI_API_KEY", "") if key is None else key
    headers = {
        "Authorization": f"Bearer {key}",
        "Content-Type": "application/json",
    }
    data = None if payload is None else json.dumps(payload).encode()
    request = Request(f"{_address(url)}/{path}", data=data, headers=headers)
    with build_opener(_SameOrigin).open(request, timeout=_PROBE_SECONDS) as answer:
        return json.load(answer)


class _SameOrigin(HTTPRedirectHandler):
    """Follows a redirect within one server only: another would get the key and the texts."""

    def redirect_request(
        self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Request | None:
        """The request that follows, or URLError for one to another server."""
        if origin(newurl) != origin(req.full_url):
            raise URLError("it sends questions on to another server")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _address(url: str | None) -> str:
    if not (url or "").startswith(("http://", "https://")):
        raise ValueError("no http address")
    return (url or "").rstrip("/")
