"""Requests to a model behind OpenAI's protocol, and their replies as values.

Retries under one budget, a write-through cache of replies, structured output as strict as the
server accepts it, one strict reader of JSON, and delimiters around text that is data. The contents
of requests are defined by `judge`, `pairs` and `engines`.

    async with Session(settings, cache=Path("work/judge.sqlite")) as session:
        colour = await session.value(request, read=lambda text: one_object(text)["colour"])
"""

from __future__ import annotations

from abliterator.server._cache import CompletionRequest, Reply, ReplyCache, Request
from abliterator.server._delimiter import Prompt, delimiter, filled, load_prompt, neutralize
from abliterator.server._http import NoReply, key_of, without_folder
from abliterator.server._read import InvalidReply, objects, without_thinking
from abliterator.server._secrets import origin, warn_of_plain_http
from abliterator.server._session import Session, Unanswered, Usage
from abliterator.server._workers import in_parallel, outside_a_loop

__all__ = [
    "CompletionRequest",
    "InvalidReply",
    "NoReply",
    "Prompt",
    "Reply",
    "ReplyCache",
    "Request",
    "Session",
    "Unanswered",
    "Usage",
    "delimiter",
    "filled",
    "in_parallel",
    "key_of",
    "load_prompt",
    "neutralize",
    "objects",
    "origin",
    "outside_a_loop",
    "warn_of_plain_http",
    "without_folder",
    "without_thinking",
]
