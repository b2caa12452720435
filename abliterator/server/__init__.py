"""A model behind OpenAI's protocol: questions in, replies that were read out, whatever happens.

The room knows how to ask: retries under one budget, a write-through cache, the ladder of structured
output, one strict reader of JSON, and a fence around text that is data. It does not know what is
asked; `judge` and `pairs` do.

    async with Session(settings, cache=Path("work/judge.sqlite")) as session:
        colour = await session.value(request, read=lambda text: one_object(text)["colour"])
"""

from __future__ import annotations

from abliterator.server._budget import OutOfBudget
from abliterator.server._cache import Reply, ReplyCache
from abliterator.server._fence import Prompt, defused, filled, load_prompt, marker
from abliterator.server._http import key_of
from abliterator.server._read import InvalidReply, objects, without_thinking
from abliterator.server._request import Request
from abliterator.server._secrets import origin, warn_of_plain_http
from abliterator.server._session import Heard, Session, Unanswered
from abliterator.server._workers import Done, in_parallel, outside_a_loop

__all__ = [
    "Done",
    "Heard",
    "InvalidReply",
    "OutOfBudget",
    "Prompt",
    "Reply",
    "ReplyCache",
    "Request",
    "Session",
    "Unanswered",
    "defused",
    "filled",
    "in_parallel",
    "key_of",
    "load_prompt",
    "marker",
    "objects",
    "origin",
    "outside_a_loop",
    "warn_of_plain_http",
    "without_thinking",
]
