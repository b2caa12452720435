"""Several requests at once: workers that share a queue and stop together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from abliterator.errors import AbliteratorError, ServerError
from abliterator.server._budget import OutOfBudget

T = TypeVar("T")
Item = TypeVar("Item")


async def in_parallel(
    items: Sequence[Item],
    work: Callable[[Item], Awaitable[T]],
    *,
    workers: int,
    at_limit: Callable[[OutOfBudget, int], AbliteratorError],
    stagger: float = 0.0,
) -> dict[Item, T]:
    """Runs `work` on distinct items, in their order, `workers` at a time.

    After a limit is reached, or a server cannot be used, no item is started; calls in flight are
    paid for, so they are waited for.

    Args:
        items: what `work` is called with.
        work: a coroutine function.
        workers: how many run at a time.
        at_limit: the error for a limit that is reached, and the number of items that are done.
        stagger: seconds between the starts of two workers. Replies of equal latency would else
            come all at once, and each next request would wait until all of them are read.

    Raises:
        ServerError: if the server cannot be used.
        AbliteratorError: from `at_limit`.
    """
    queue, results = iter(items), dict[Item, T]()
    stops: list[OutOfBudget | ServerError] = []

    async def worker(number: int) -> None:
        await asyncio.sleep(number * stagger)
        for item in queue:
            if stops:
                return
            try:
                results[item] = await work(item)
            except (OutOfBudget, ServerError) as stop:
                stops.append(stop)
                return

    await asyncio.gather(*(worker(number) for number in range(workers)))
    if not stops:
        return results
    stop = stops[0]
    raise at_limit(stop, len(results)) if isinstance(stop, OutOfBudget) else stop


def outside_a_loop(work: Callable[[], T]) -> T:
    """Calls `work`, in a thread of its own where an event loop runs already (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return work()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()
