"""Requests of one run to a server: cached, within a budget, repeated until a reply is valid."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from abliterator.recipe import ServerSettings
from abliterator.server._budget import Budget
from abliterator.server._cache import CompletionRequest, Reply, ReplyCache, Request
from abliterator.server._http import NoReply, Server
from abliterator.server._read import InvalidReply

# Reasons to finish that leave a reply cut or withheld, in the words of several servers. After any
# other a reply is read: whether it is whole, the reader of replies decides.
INCOMPLETE = {
    *("length", "max_tokens", "max_output_tokens", "model_length", "token_limit", "incomplete"),
    *("content_filter", "content_filtered", "refusal", "safety", "recitation", "blocklist"),
    *("guardrail_intervened", "prohibited_content", "spii"),
    *("error", "abort", "aborted", "cancelled", "failed", "insufficient_system_resource"),
    *("tool_calls", "tool_call", "tool_use", "function_call"),
}

T = TypeVar("T")


class Unanswered(Exception):
    """A request that got no valid reply in all its attempts; the message says why."""


@dataclass
class Usage:
    """Calls and dollars that a session spent, and what its server reports of itself."""

    calls: int = 0
    cost: float = 0.0
    invalid: int = 0
    models: set[str] = field(default_factory=set)
    fingerprints: set[str] = field(default_factory=set)
    response_formats: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        return f"{self.calls} calls" + (f", ${self.cost:.4f}" if self.cost else "")


class Session:
    """Requests to one server.

    Args:
        settings: the server, and what may be spent on it.
        cache: SQLite file of replies; the same file makes a run go on where it stopped.
        account: name under which calls and dollars are counted, where judges share a file.
        on_failure: called after each failed call, before it is tried again; may raise ServerError.
    """

    def __init__(
        self,
        settings: ServerSettings,
        *,
        cache: Path,
        account: str = "",
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self._settings = settings
        self._cache = ReplyCache(cache, account=account)
        calls, cost = self._cache.totals()
        self._budget = Budget(settings, calls=calls, cost=cost)
        self._server = Server(settings, self._budget, on_failure=on_failure)
        self.usage = Usage(calls, cost)

    async def __aenter__(self) -> Self:
        try:
            await self._server.__aenter__()
        except BaseException:
            self._cache.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._cache.close()
        await self._server.__aexit__()

    async def value(self, request: Callable[[int], Request], read: Callable[[str], T]) -> T:
        """The parsed reply to a request; the request is repeated where `read` rejects the reply.

        Args:
            request: the request of an attempt, from 0; attempts differ in their delimiter.
            read: parses a reply; raises InvalidReply for one that is not as expected.

        Raises:
            Unanswered: if no attempt got a valid reply.
            OutOfBudget: if a limit would be passed.
            ServerError: if the server cannot be used at all.
        """
        problem = ""
        for attempt in range(1 + self._settings.retries):
            try:
                return read(await self._text(request(attempt)))
            except NoReply as error:
                raise Unanswered(f"no reply ({error})") from None
            except InvalidReply as error:
                self.usage.invalid += 1
                problem = str(error)
        raise Unanswered(f"{1 + self._settings.retries} invalid replies, the last: {problem}")

    async def reply(self, request: Request | CompletionRequest) -> Reply:
        """The reply to a request, from the cache where it has one.

        Raises:
            NoReply: if this request gets none, though others may.
            OutOfBudget: if a limit would be passed.
            ServerError: if the server cannot be used at all.
        """
        key = request.key(self._settings)
        reply = self._cache.get(key)
        if reply is None:
            reply = await self._server.ask(request)
            cost = self._budget.price(reply)
            self._cache.put(key, reply, cost=cost)
            self._budget.spend(cost)
        self._count(reply)
        return reply

    async def json_of(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON at a path of the server, as it is now.

        Raises:
            openai.APIError, ValueError: if there is none.
        """
        return await self._server.json_of(path, body)

    async def _text(self, request: Request) -> str:
        reply = await self.reply(request)
        if (reply.finish_reason or "").strip().lower() in INCOMPLETE:
            raise InvalidReply(f"finished by {reply.finish_reason}")
        return reply.text

    def _count(self, reply: Reply) -> None:
        usage = self.usage
        for name, names in (
            (reply.model, usage.models),
            (reply.fingerprint, usage.fingerprints),
            (reply.response_format, usage.response_formats),
        ):
            if name is not None:
                names.add(name)
        usage.calls, usage.cost = self._budget.calls, self._budget.cost
