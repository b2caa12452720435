"""Reads the JSON of /v1/completions, whichever server wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from abliterator.server._cache import Reply
from abliterator.server._read import without_surrogates

_AS_ID = "token_id:"  # how vLLM writes a token of `logprobs` on request


def completion_reply(body: object) -> Reply:
    """Text, token ids, end and usage of the one completion in a body.

    Raises:
        ValueError: for a body that is no completion.
    """
    try:
        choice = body["choices"][0]  # type: ignore[index]
        text = choice["text"]
    except (LookupError, TypeError):
        raise ValueError("no completion") from None
    if not (isinstance(body, dict) and isinstance(choice, dict) and isinstance(text, str)):
        raise ValueError("no completion")
    usage = body.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    model, reason = body.get("model"), choice.get("finish_reason")
    return Reply(
        text=without_surrogates(text),
        finish_reason=reason if isinstance(reason, str) else None,
        model=model if isinstance(model, str) else None,
        input_tokens=_count(counts.get("prompt_tokens")),
        output_tokens=_count(counts.get("completion_tokens")),
        token_ids=_token_ids(choice),
    )


def _token_ids(choice: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Token ids of a completion: from their own field, or from the log-probabilities."""
    ids: Any = choice.get("token_ids")
    logprobs = choice.get("logprobs")
    if ids is None and isinstance(logprobs, dict):
        if isinstance(content := logprobs.get("content"), list):  # llama.cpp
            ids = [entry.get("id") if isinstance(entry, dict) else None for entry in content]
        elif isinstance(tokens := logprobs.get("tokens"), list):  # vLLM before 0.10.2
            ids = [_id_in(token) for token in tokens]
    is_whole = isinstance(ids, list) and all(type(token) is int and token >= 0 for token in ids)
    return tuple(ids) if is_whole else None


def _id_in(token: object) -> int | None:
    digits = token.removeprefix(_AS_ID) if isinstance(token, str) else ""
    is_id = digits != token and digits.isascii() and digits.isdigit()
    return int(digits) if is_id else None


def _count(value: object) -> int:
    return max(0, value) if isinstance(value, int) else 0
