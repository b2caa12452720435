"""Makes pairs in rounds of writing, filtering and checking, until every category is complete.

The requests of a round depend on the rounds before it alone, so that a run that was killed finds
its replies in the cache and goes on where it stopped.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from abliterator.errors import PairsError
from abliterator.pairs._filter import Length, PairFilter
from abliterator.pairs._questions import (
    SIDES,
    Candidate,
    read_pairs,
    read_side,
    sorting_request,
    writing_request,
)
from abliterator.recipe import PairsSpec
from abliterator.server import Session, Unanswered, in_parallel, outside_a_loop

T = TypeVar("T")


class Made(NamedTuple):
    """Pairs by category, with the calls and dollars spent on them."""

    pairs: dict[str, list[Candidate]]
    dropped: dict[str, int]  # how many candidates were dropped, by reason
    served: tuple[str, ...]  # names of the model, as the server reports them
    calls: int
    usd: float


@dataclass
class Category:
    """The pairs of one category, its candidates, and how many of them were dropped."""

    name: str
    kept: list[Candidate] = field(default_factory=list)
    waiting: deque[Candidate] = field(default_factory=deque)
    dropped: Counter[str] = field(default_factory=Counter)
    calls: int = 0
    calls_without_pair: int = 0  # in a row


def make_pairs(
    spec: PairsSpec,
    *,
    cache: Path,
    length: Length,
    on_kept: Callable[[int, str], None] | None = None,
) -> Made:
    """Makes the pairs that a spec describes.

    Args:
        spec: which pairs are wanted.
        cache: SQLite file of the server's replies; with the same file a run goes on.
        length: how the lengths of requests are measured.
        on_kept: called after each round with the number of new pairs, and the calls and dollars so
            far, as text.

    Raises:
        PairsError: if a category gets no new pair in `patience` calls, or a limit is reached.
        ServerError: if the server cannot be used.
    """
    return outside_a_loop(lambda: asyncio.run(_Maker(spec, length, on_kept).run(cache)))


class _Maker:
    def __init__(
        self, spec: PairsSpec, length: Length, on_kept: Callable[[int, str], None] | None
    ) -> None:
        self._spec = spec
        self._on_kept = on_kept
        self._categories = [Category(name) for name in spec.categories]
        self._filter = PairFilter(
            length, length_gap=spec.length_gap, near_duplicate=spec.near_duplicate
        )

    async def run(self, cache: Path) -> Made:
        async with Session(self._spec.server, cache=cache) as session:
            while unfinished := [c for c in self._categories if self._missing(c)]:
                await self._write(session, [c for c in unfinished if not c.waiting])
                kept = await self._check(
                    session, [(c, p) for c in unfinished for p in self._accepted(c)]
                )
                if self._on_kept is not None:
                    self._on_kept(kept, str(session.usage))
                for category in unfinished:
                    self._require_progress(category)
            usage = session.usage
        dropped = sum((c.dropped for c in self._categories), Counter[str]())
        pairs = {c.name: c.kept for c in self._categories}
        return Made(pairs, dict(dropped), tuple(sorted(usage.models)), usage.calls, usage.cost)

    def _missing(self, category: Category) -> int:
        return self._spec.per_category - len(category.kept)

    async def _write(self, session: Session, categories: Sequence[Category]) -> None:
        """One call for each category that has nothing left to check."""
        by_name = {category.name: category for category in categories}

        async def written(name: str) -> list[Candidate]:
            category = by_name[name]
            existing = [pair.target for pair in category.kept]
            try:
                return await session.value(
                    lambda attempt: writing_request(
                        self._spec, name, existing, call=category.calls, attempt=attempt
                    ),
                    read_pairs,
                )
            except Unanswered:
                category.dropped["no reply with pairs"] += 1
                return []

        candidates = await self._run_all(list(by_name), written)
        for category in categories:
            category.calls += 1
            category.calls_without_pair += 1  # until one of them is kept
            category.waiting.extend(candidates[category.name])

    def _accepted(self, category: Category) -> list[Candidate]:
        """Candidates that pass the filter, as many as are missing."""
        accepted: list[Candidate] = []
        while category.waiting and len(accepted) < self._missing(category):
            candidate = category.waiting.popleft()
            reason = self._filter.rejection_reason(candidate)
            if reason is None:
                accepted.append(candidate)
            else:
                category.dropped[reason] += 1
        return accepted

    async def _check(
        self, session: Session, candidates: Sequence[tuple[Category, Candidate]]
    ) -> int:
        """Keeps the pairs whose requests are each sorted to their own side; returns how many."""

        async def sorted_to(request: str) -> str:
            try:
                side = await session.value(
                    lambda attempt: sorting_request(self._spec, request, attempt=attempt), read_side
                )
            except Unanswered:
                return "the check brought no label"
            return side or "neither"

        requests = [text for _, candidate in candidates for text in candidate]
        sides = await self._run_all(requests, sorted_to)
        kept = 0
        for category, candidate in candidates:
            mismatched = [side for side in SIDES if sides[getattr(candidate, side)] != side]
            if mismatched:
                category.dropped[f"its {' and '.join(mismatched)} is not what it should be"] += 1
            else:
                category.kept.append(candidate)
                category.calls_without_pair = 0
                kept += 1
        return kept

    async def _run_all(
        self, items: Sequence[str], work: Callable[[str], Awaitable[T]]
    ) -> dict[str, T]:
        """Runs `work` on every item; the error at a limit says which pairs there are."""
        return await in_parallel(
            items,
            work,
            workers=self._spec.server.concurrency,
            at_limit=lambda limit, _: PairsError(
                f"Stopped: {limit}. {self._progress()} All replies are kept; raise the limit, and "
                "the same command goes on from there."
            ),
        )

    def _require_progress(self, category: Category) -> None:
        if category.calls_without_pair < self._spec.patience or not self._missing(category):
            return
        reasons = ", ".join(f"{n} x {reason}" for reason, n in category.dropped.most_common())
        raise PairsError(
            f"The category {category.name!r} has {len(category.kept)} of {self._spec.per_category} "
            f"pairs, and {category.calls_without_pair} calls in a row gave it none. Dropped: "
            f"{reasons}. {self._progress()} Describe the category more widely, split it, lower "
            "`per_category`, or loosen `near_duplicate` or `length_gap`; replies are kept."
        )

    def _progress(self) -> str:
        counts = ", ".join(f"{len(c.kept)} {c.name}" for c in self._categories)
        return f"Pairs so far: {counts}."
