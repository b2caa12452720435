"""A client of one OpenAI-compatible server: a conversation in, a reply out.

Overload, server errors, dropped connections, timeouts and unreadable replies are tried again, for
as long as the budget lasts; a server that is plainly set up wrongly stops the run. Structured
output is asked for as strictly as the server accepts it: json_schema, json_object, or not at all.
The key is read from the environment, given to the client, and kept nowhere else.

The waits are ours and not the SDK's: it counts neither calls nor dollars between two tries, waits
without asking whether the run has that much time left, and gives up at a Retry-After of more than
one or two minutes (by version), which this client waits for.

    async with Server(settings, budget) as server:
        reply = await server.ask(Request([{"role": "user", "content": "..."}], schema, {}))
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urljoin, urlsplit

from abliterator.errors import ServerError
from abliterator.recipe import ServerSettings
from abliterator.server._budget import Budget
from abliterator.server._cache import CompletionRequest, Reply, Request
from abliterator.server._completions import completion_reply
from abliterator.server._read import without_surrogates
from abliterator.server._secrets import is_loopback, origin, redacted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from openai import APIStatusError, AsyncOpenAI
    from openai._types import RequestOptions

TRIES = 8  # of one call, before its item is given up as unscored
REFUSED_FIRST = 8  # calls refused with a status of their own, and none answered yet: the set-up
IN_A_ROW = 24  # failed calls, of all workers, without an answer between them: the server is down
WAIT = (0.5, 20.0)  # seconds, first and longest, where the server names none
PASSING = {408, 409, 425, 429}  # and 5xx: worth another try
SETUP = {401, 402, 403, 404, 405}  # errors that every other item would meet too
TEXT_PARTS = {"text", "output_text"}
RESPONSE_FORMATS = ("json_schema", "json_object", "none")  # the strictest first
ABOUT_FORMAT = ("response_format", "json_schema", "json_object", "structured", "grammar", "schema")
PROBE_SECONDS = 30.0  # for one request about the server itself
EXCERPT_CHARACTERS = 300  # of a server's text, quoted in a message


class NoReply(Exception):
    """A call that got no reply in all its tries, or was refused; the message says why.

    `refused` is true of a status that a retry would meet again.
    """

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


class Server:
    """A client of one server, used by several workers of one event loop."""

    def __init__(
        self, settings: ServerSettings, budget: Budget, *, on_failure: Callable[[], None]
    ) -> None:
        self._settings = settings
        self._budget = budget
        self._on_failure = on_failure
        self._failed_in_a_row = 0
        self._answered = False
        self._may_drop = settings.structured == "auto"
        # index of RESPONSE_FORMATS
        self._format = 0 if self._may_drop else RESPONSE_FORMATS.index(settings.structured)
        self._client: AsyncOpenAI | None = None

    async def __aenter__(self) -> Self:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        hooks = {"response": [self._refuse_other_origin]}
        is_local = is_loopback(urlsplit(self._settings.base_url).hostname or "")
        self._client = AsyncOpenAI(
            base_url=self._settings.base_url,
            api_key=key_of(self._settings),
            timeout=self._settings.timeout,
            max_retries=0,
            # no proxy of the environment reaches this machine's own ports
            http_client=DefaultAsyncHttpxClient(event_hooks=hooks, trust_env=not is_local),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._client is not None:
            await self._client.close()

    async def ask(self, request: Request | CompletionRequest) -> Reply:
        """The reply to a request.

        Raises:
            OutOfBudget: if a limit of the recipe would be passed.
            NoReply: if this call gets none, though others may.
            ServerError: if the server cannot be used at all.
        """
        from openai import APIConnectionError, APIError, APIStatusError

        tries = 0
        while True:
            format_index = self._format
            retry_after = None
            try:
                with self._budget.call(self._budget.expected(request)):
                    reply = await self._call(request, RESPONSE_FORMATS[format_index])
            except APIStatusError as error:
                if self._drop_format(error, format_index):
                    continue
                self._require_usable(error)
                failure, retry_after = f"status {error.status_code}", _retry_after(error)
            except (APIConnectionError, TimeoutError) as error:
                if isinstance(error.__cause__, ServerError):  # of a hook of the client's
                    raise error.__cause__ from None
                # before APIError, its parent: a broken connection has no message of its own
                failure = type(error).__name__
            except (APIError, ValueError) as error:
                failure = f"an unreadable body ({type(error).__name__})"
            else:
                self._failed_in_a_row, self._answered = 0, True
                return reply
            tries += 1
            await self._wait(tries, failure, retry_after)

    async def json_of(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON at a path of the server, once and without retries; a body is posted.

        Args:
            path: below the address, as "models"; or an absolute URL of the same server.
            body: of the request.

        Raises:
            openai.APIError, ValueError: if there is none.
        """
        assert self._client is not None
        client, options = self._client, _headers()
        async with asyncio.timeout(min(self._settings.timeout, PROBE_SECONDS)):
            if body is None:
                value = await client.get(path, cast_to=object, options=options)
            else:
                value = await client.post(path, cast_to=object, body=body, options=options)
        return json.loads(redacted(json.dumps(value), self._settings))  # it may quote the key

    async def _call(self, request: Request | CompletionRequest, response_format: str) -> Reply:
        assert self._client is not None
        model = self._settings.model
        async with asyncio.timeout(self._settings.timeout):
            if isinstance(request, CompletionRequest):
                body = {"model": model, **request.body}
                completion = await self._client.post(
                    "/completions", cast_to=object, body=body, options=_headers()
                )
                reply = completion_reply(completion)
            else:
                messages: Any = list(request.messages)
                chat = await self._client.chat.completions.create(
                    model=model,
                    messages=messages,
                    extra_body={**request.parameters, **_format(response_format, request)},
                    extra_headers=_headers()["headers"],
                )
                reply = _reply(chat, response_format)
        for name in ("text", "finish_reason", "model", "fingerprint"):  # free text from the server
            if text := getattr(reply, name):
                plain: dict[str, Any] = {name: redacted(text, self._settings)}
                reply = reply._replace(**plain)
        return reply

    async def _refuse_other_origin(self, response: Any) -> None:
        """Raises ServerError for a redirect to another server, which would get key and texts."""
        if not response.has_redirect_location:
            return
        base_url = self._settings.base_url
        location = urljoin(str(response.request.url), response.headers["location"])
        if origin(location) != origin(base_url):
            other = self._excerpt("{}://{}".format(*origin(location)))
            raise ServerError(
                f"The server {base_url} sends questions on to another, {other}, which was not "
                f"asked to see them. Check `{self._settings.url_key}`; if you trust the other one, "
                "name it there."
            )

    def _drop_format(self, error: APIStatusError, format_index: int) -> bool:
        """Whether the server refused the response format, and a plainer one can be tried."""
        about_format = any(word in _message(error).lower() for word in ABOUT_FORMAT)
        if error.status_code not in (400, 415, 422, 501) or not about_format:
            return False
        if not self._may_drop or format_index + 1 >= len(RESPONSE_FORMATS):
            return False
        self._format = max(self._format, format_index + 1)
        return True

    def _require_usable(self, error: APIStatusError) -> None:
        """Raises ServerError or NoReply for an error that a retry would meet again."""
        status = error.status_code
        if status in PASSING or status >= 500:
            return
        refusal = f"{status}: {self._excerpt(_message(error))}"
        settings, section = self._settings, self._settings.section
        if status in SETUP:
            no_key = f"whether it wants a key (`{section}.api_key_env`)."
            raise ServerError(
                f"The server {settings.base_url} refused with {refusal}. Check "
                f"`{settings.url_key}`, `{settings.model_key}` ({settings.model}) and "
                + (f"the key in ${settings.api_key_env}." if settings.api_key_env else no_key)
            ) from None
        self._count_failure(refusal)
        if not self._answered and self._failed_in_a_row >= REFUSED_FIRST:
            raise ServerError(
                f"The server {settings.base_url} refused each of the first "
                f"{self._failed_in_a_row} calls, the last with {refusal}. Check "
                f"`{settings.model_key}` ({settings.model}), `{section}.parameters` and "
                f"`{section}.structured`."
            ) from None
        raise NoReply(f"refused with {refusal}", refused=True) from None

    async def _wait(self, tries: int, failure: str, retry_after: float | None) -> None:
        """Waits before the next try: a growing back-off, or longer where the server asks for it."""
        self._count_failure(failure)
        self._on_failure()
        if tries >= TRIES:
            raise NoReply(f"{failure}, {tries} times")
        first, longest = WAIT
        backoff = min(longest, first * 2 ** (tries - 1)) * random.uniform(0.75, 1.0)
        delay = max(backoff, retry_after or 0.0)
        self._budget.require_time(delay, to=f"wait {delay:.0f} s after {failure}")
        await asyncio.sleep(delay)

    def _count_failure(self, failure: str) -> None:
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= max(IN_A_ROW, 2 * self._settings.concurrency):
            raise ServerError(
                f"The server {self._settings.base_url} failed {self._failed_in_a_row} calls in a "
                f"row, the last with {failure}. Check that it runs and serves "
                f"`{self._settings.model}`; what was answered is kept, and the same command goes "
                "on from there."
            ) from None

    def _excerpt(self, text: str) -> str:
        """A server's text on one line, short, and without the key should it echo it."""
        return redacted(" ".join(text.split()), self._settings)[:EXCERPT_CHARACTERS]


def _headers() -> RequestOptions:
    """Options without headers that the client would send of the environment to any server."""
    from openai import Omit

    return {"headers": {"OpenAI-Organization": Omit(), "OpenAI-Project": Omit()}}


def _message(error: APIStatusError) -> str:
    """The text of a refusal: OpenAI's own form, FastAPI's `detail`, or plain text.

    The client's message holds the first alone.
    """
    body = error.body
    if isinstance(body, dict):
        texts = (body.get(key) for key in ("message", "detail"))
        return next((text for text in texts if text and isinstance(text, str)), json.dumps(body))
    return body if isinstance(body, str) and body else error.message


def _format(response_format: str, request: Request) -> dict[str, Any]:
    """The part of the request's body that asks for structured output."""
    if response_format == "none":
        return {}
    if response_format == "json_object":
        return {"response_format": {"type": "json_object"}}
    strict = {"name": "reply", "strict": True, "schema": request.schema}
    return {"response_format": {"type": "json_schema", "json_schema": strict}}


def key_of(settings: ServerSettings) -> str:
    """The API key from the environment; the placeholder "none" where no key is needed.

    Raises:
        ServerError: if the variable that the recipe names is not set.
    """
    name = settings.api_key_env
    if name is None:
        return "none"
    key = os.environ.get(name, "").strip()
    if not key:
        raise ServerError(
            f"A key is expected in the environment variable {name}, which is not set. Set it, or "
            f"`{settings.section}.api_key_env: null` for a server that wants no key."
        )
    if not (key.isascii() and key.isprintable()):
        raise ServerError(
            f"The key in {name} has characters that no header can carry: set it anew."
        )
    return key


def _reply(completion: Any, response_format: str) -> Reply:
    """Text, end and usage of a completion.

    The client passes on whatever JSON came, so its types are not to be believed.

    Raises:
        ValueError: for a body that is no completion.
    """
    try:
        choice = completion.choices[0]
        message = choice.message
        content, refusal = message.content, getattr(message, "refusal", None)
    except (AttributeError, IndexError, KeyError, TypeError):
        raise ValueError("no completion") from None
    counts: Any = getattr(completion, "usage", None)
    usage = counts.model_dump(warnings=False) if hasattr(counts, "model_dump") else {}
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return Reply(
        text=_content(content),
        finish_reason="refusal" if refusal else _text(getattr(choice, "finish_reason", None)),
        model=without_folder(_text(getattr(completion, "model", None))),
        fingerprint=_text(getattr(completion, "system_fingerprint", None)),
        response_format=response_format,
        input_tokens=_count(usage.get("prompt_tokens")),
        cached_tokens=_count(usage.get("prompt_cache_hit_tokens")) or _count(cached),
        output_tokens=_count(usage.get("completion_tokens")),
    )


def _text(value: object) -> str | None:
    return without_surrogates(value) if isinstance(value, str) else None


def _content(value: object) -> str:
    """The text of a message: a string, or a list of parts of which those of text count."""
    if not isinstance(value, list):
        return _text(value) or ""
    return "".join(
        part if isinstance(part, str) else _text(part.get("text")) or ""
        for part in value
        if isinstance(part, str)
        or (isinstance(part, dict) and part.get("type", "text") in TEXT_PARTS)
    )


def without_folder(model: str | None) -> str | None:
    """A model's name for publication; of a local path, the last part."""
    is_path = model is not None and (model.startswith(("/", "~", "./")) or "\\" in model)
    return re.split(r"[/\\]", model.rstrip("/\\"))[-1] if model and is_path else model


def _count(value: object) -> int:
    return max(0, value) if isinstance(value, int) else 0


def _retry_after(error: APIStatusError) -> float | None:
    """Seconds that the server asks to wait, however long: in ms, in seconds, or until a date."""
    headers = error.response.headers
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) / unit)
        except (KeyError, ValueError):
            continue
    try:
        until = parsedate_to_datetime(headers.get("retry-after", ""))
    except ValueError:
        return None
    aware = until if until.tzinfo else until.replace(tzinfo=UTC)
    return max(0.0, (aware - datetime.now(UTC)).total_seconds())
