"""Several questions at once: workers that share a queue and stop together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

from abliterator.errors import ServerError
from abliterator.server._budget import OutOfBudget

T = TypeVar("T")
Item = TypeVar("Item")


class Done(NamedTuple, Generic[Item, T]):
    """Results by item, and what stopped the workers before the end, if anything did."""

    results: dict[Item, T]
    stopped: OutOfBudget | ServerError | None


async def in_parallel(
    items: Sequence[Item], work: Callable[[Item], Awaitable[T]], *, workers: int
) -> Done[Item, T]:
    """Runs `work` on distinct items, in their order, `workers` at a time.

    After a limit is reached, or a server cannot be used, no item is started; calls in flight are
    paid for, so they are waited for.
    """
    queue, results = iter(items), dict[Item, T]()
    stops: list[OutOfBudget | ServerError] = []

    async def worker() -> None:
        for item in queue:
            if stops:
                return
            try:
                results[item] = await work(item)
            except (OutOfBudget, ServerError) as stop:
                stops.append(stop)
                return

    await asyncio.gather(*(worker() for _ in range(workers)))
    return Done(results, stops[0] if stops else None)


def outside_a_loop(work: Callable[[], T]) -> T:
    """Calls `work`, in a thread of its own where an event loop runs already (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return work()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()
