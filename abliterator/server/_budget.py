"""The limits of a run: seconds, calls and dollars, checked before each call.

Calls in flight count as if they had been answered, at a price estimated high.

    budget = Budget(settings, calls=0, cost=0.0)
    with budget.call(expected=0.01):  # raises OutOfBudget
        ...
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from abliterator.recipe import ServerSettings
from abliterator.server._cache import CompletionRequest, Reply, Request

MILLION = 1_000_000
BYTES_PER_TOKEN = 3  # of English text there are four; a limit is better reached early than late
USUAL_OUTPUT = 1024  # tokens reserved for a reply where the recipe sets no limit to it


class OutOfBudget(Exception):
    """A limit of the recipe would be passed; the message says which."""


class Budget:
    """Calls and dollars spent, and reserved for calls in flight."""

    def __init__(self, settings: ServerSettings, *, calls: int, cost: float) -> None:
        self._settings = settings
        self._deadline = monotonic() + settings.time_limit
        self._in_flight = 0
        self._reserved = 0.0
        self.calls = calls
        self.cost = cost

    def require_time(self, seconds: float, *, to: str) -> None:
        """Raises OutOfBudget if the run has no such time left."""
        if seconds >= self._deadline - monotonic():
            limit = self._settings.time_limit
            raise OutOfBudget(
                f"{self._key_name('time_limit')} of {limit:g} s leaves no time to {to}"
            )

    @contextmanager
    def call(self, expected: float) -> Iterator[None]:
        """Reserves one call and its expected cost in dollars while it is in flight.

        Raises:
            OutOfBudget: if a limit would be passed.
        """
        settings = self._settings
        self.require_time(0, to="ask on")
        if settings.max_calls is not None and self.calls + self._in_flight >= settings.max_calls:
            raise OutOfBudget(f"{self._key_name('max_calls')} of {settings.max_calls} is reached")
        planned = self.cost + self._reserved + expected
        if settings.max_usd is not None and planned > settings.max_usd:
            raise OutOfBudget(
                f"{self._key_name('max_usd')} of {settings.max_usd:g} would be passed "
                f"({self.cost:.4f} spent)"
            )
        self._in_flight += 1
        self._reserved += expected
        try:
            yield
        finally:
            self._in_flight -= 1
            self._reserved -= expected

    def spend(self, cost: float) -> None:
        """Counts one answered call and its dollars."""
        self.calls += 1
        self.cost += cost

    def price(self, reply: Reply) -> float:
        """Dollars of one reply by the recipe's prices; 0 where it has none."""
        prices = self._settings.prices
        if prices is None:
            return 0.0
        fresh = reply.input_tokens - reply.cached_tokens
        cached = prices.input if prices.cached_input is None else prices.cached_input
        dollars = fresh * prices.input + reply.cached_tokens * cached
        return (dollars + reply.output_tokens * prices.output) / MILLION

    def expected(self, request: Request | CompletionRequest) -> float:
        """Dollars that a call may cost, estimated high, before it is made."""
        prices = self._settings.prices
        if prices is None or isinstance(request, CompletionRequest):
            return 0.0
        prompt = sum(len(m["content"].encode()) for m in request.messages) / BYTES_PER_TOKEN
        limits = (request.parameters.get(key) for key in ("max_completion_tokens", "max_tokens"))
        reply = next((x for x in limits if isinstance(x, int)), USUAL_OUTPUT)
        return (prompt * prices.input + reply * prices.output) / MILLION

    def _key_name(self, field: str) -> str:
        """A limit as the recipe's dotted key."""
        return f"`{self._settings.section}.{field}`"
