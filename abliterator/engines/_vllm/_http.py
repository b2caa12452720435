"""Requests about a vLLM server itself: the models it serves, and its adapters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from abliterator.errors import GenerationError

if TYPE_CHECKING:
    from abliterator.engines._vllm._process import Address

_SECONDS = 5.0
_LOAD_SECONDS = 600.0
_EXCERPT_CHARACTERS = 300


class AdapterRefused(GenerationError):
    """The server refused an adapter."""


def served_models(address: Address) -> list[str]:
    """Names of the models that a server has; none while it does not answer."""
    try:
        models = json.loads(_ask(address, "models", timeout=_SECONDS))["data"]
        return [str(model["id"]) for model in models]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def load_adapter(address: Address, name: str, folder: Path) -> None:
    """Makes a server answer under `name` with the adapter in `folder`.

    Raises:
        AdapterRefused: with what the server says.
    """
    body = {"lora_name": name, "lora_path": str(folder.absolute())}
    try:
        _ask(address, "load_lora_adapter", body, timeout=_LOAD_SECONDS)
    except HTTPError as error:
        text = " ".join(error.read().decode("utf-8", errors="replace").split())
        raise AdapterRefused(
            f"vLLM refused the adapter of a candidate: {text[:_EXCERPT_CHARACTERS]}"
        ) from None


def first_token(address: Address, model: str, prompt: Sequence[int]) -> Any:
    """The log-probabilities of the likeliest first tokens of an answer, as the server has them."""
    body = {"model": model, "prompt": list(prompt), "max_tokens": 1, "temperature": 0}
    reply = _ask(address, "completions", {**body, "logprobs": 5}, timeout=_LOAD_SECONDS)
    return json.loads(reply)["choices"][0]["logprobs"]["top_logprobs"][0]


def unload_adapter(address: Address, name: str) -> None:
    """Frees an adapter of a server."""
    _ask(address, "unload_lora_adapter", {"lora_name": name}, timeout=_LOAD_SECONDS)


def _ask(address: Address, path: str, body: Any = None, *, timeout: float) -> bytes:
    """The reply of a server on this machine, which no proxy reaches."""
    request = Request(
        f"{address.base_url}/{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={
            "Authorization": f"Bearer {address.key}",
            "Content-Type": "application/json",
        },
    )
    with build_opener(ProxyHandler({})).open(request, timeout=timeout) as response:
        content: bytes = response.read()
        return content
