"""Successive halving: many candidates answer few prompts, few answer all prompts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

from abliterator.recipe import Selection


class Scored(Protocol):
    """Judged answers of one candidate to some prompts; more of them are added."""

    @property
    def mean_product(self) -> float:
        """Mean compliance x coherence."""

    def __add__(self, other: Self, /) -> Self: ...


T = TypeVar("T", bound=Scored)


@dataclass(frozen=True)
class Entrant(Generic[T]):
    """A candidate of a race.

    Attributes:
        index: of the candidate.
        kl: its divergence, measured before the race.
        judged: all its answers so far, after each rung that it reached.
        prompts: how many they are, after each rung.
    """

    index: int
    kl: float
    judged: tuple[T, ...] = ()
    prompts: tuple[int, ...] = ()

    @property
    def product(self) -> float:
        """Mean compliance x coherence of all its answers so far; 0 before the first."""
        return self.judged[-1].mean_product if self.judged else 0.0

    def beats(self, other: Entrant[T]) -> bool:
        """Whether it has at least the other's product at no more KL, and is not equal in both."""
        no_worse = self.product >= other.product and self.kl <= other.kl
        return no_worse and (self.product, self.kl) != (other.product, other.kl)

    def clearly_beats(self, other: Entrant[T]) -> bool:
        """Whether it beats the other by more than the noise of the n prompts that both answered.

        That is 1 / sqrt(n): twice the standard error of a mean of differences that spread by .5.
        """
        more = self.product - other.product
        return self.kl <= other.kl and more > self.prompts[-1] ** -0.5


class Objective(Protocol):
    """What a race looks for."""

    def ranked(self, entrants: Sequence[Entrant[T]]) -> list[Entrant[T]]:
        """The best first, of entrants that answered the same prompts, at least one."""

    def least(self, entrants: Sequence[Entrant[T]]) -> int:
        """How many of them must go on to the next rung at least."""

    def returns(self, dropped: Entrant[T], finished: Sequence[Entrant[T]]) -> bool:
        """Whether one that dropped out may be better than those that answered all prompts."""


class BestProduct:
    """Looks for the highest product; of equals the lowest KL is better."""

    def ranked(self, entrants: Sequence[Entrant[T]]) -> list[Entrant[T]]:
        """By product, then by KL."""
        return sorted(entrants, key=lambda e: (-e.product, e.kl))

    def least(self, entrants: Sequence[Entrant[T]]) -> int:
        """None must."""
        return 0

    def returns(self, dropped: Entrant[T], finished: Sequence[Entrant[T]]) -> bool:
        """Where its product is higher than the best's."""
        return dropped.product > finished[0].product


class WholeFront:
    """Looks for every candidate that no other beats in both product and KL."""

    def ranked(self, entrants: Sequence[Entrant[T]]) -> list[Entrant[T]]:
        """By how many others clearly beat each, then by product and KL."""
        beaten = {e.index: sum(other.clearly_beats(e) for other in entrants) for e in entrants}
        return sorted(entrants, key=lambda e: (beaten[e.index], -e.product, e.kl))

    def least(self, entrants: Sequence[Entrant[T]]) -> int:
        """Those that none of the others clearly beats."""
        return sum(not any(other.clearly_beats(e) for other in entrants) for e in entrants)

    def returns(self, dropped: Entrant[T], finished: Sequence[Entrant[T]]) -> bool:
        """Where none of the others beats it any more."""
        return not any(other.beats(dropped) for other in finished)


def race(
    kl: Sequence[float],
    judge: Callable[[Sequence[int], Sequence[int]], Sequence[T]],
    settings: Selection,
    *,
    prompts: int,
    seed: int,
    least: int = 1,
    objective: Objective | None = None,
    on_rung: Callable[[int, int, int], None] = lambda candidates, prompts, answers: None,
) -> list[Entrant[T]]:
    """Judges candidates rung by rung, dropping the worst after each (Jamieson & Talwalkar 2016).

    An answer that was judged is never asked for again: a rung adds prompts to the one before it.
    Where a candidate that dropped out looks better than those that stayed at last, it is judged
    on all prompts too, so that none wins by chance on the few prompts of a short rung.

    Args:
        kl: of each candidate.
        judge: given indices of candidates and of prompts, judged answers of each candidate.
        settings: prompts of each rung, and the share that goes on.
        prompts: that there are; they are asked in an order that `seed` draws.
        seed: of that order.
        least: so many reach the last rung, if there are as many.
        objective: what is looked for; the best product unless given.
        on_rung: called after each rung with its candidates, the prompts that they have answered
            and the answers that were new.

    Returns:
        All candidates, the best first: by rungs, then as the objective ranks them.
    """
    objective = objective or BestProduct()
    order = random.Random(seed).sample(range(prompts), prompts)
    racing: list[Entrant[T]] = [Entrant(index, value) for index, value in enumerate(kl)]
    dropped: list[Entrant[T]] = []

    def judge_more(chosen: Sequence[Entrant[T]], first: int, reached: int) -> list[Entrant[T]]:
        judged = judge([e.index for e in chosen], order[first:reached])
        on_rung(len(chosen), reached, len(chosen) * (reached - first))
        return objective.ranked(
            [_with(e, new, reached) for e, new in zip(chosen, judged, strict=True)]
        )

    first = 0
    for n_racing, reached in settings.schedule(len(racing), prompts, least):
        n = max(n_racing, objective.least(racing) if first else 0)
        racing, dropped = racing[:n], [*racing[n:], *dropped]
        racing = judge_more(racing, first, reached)
        first = reached
    # few prompts are noisy: what dropped out and looks better is judged on all prompts
    while returning := [e for e in dropped if objective.returns(e, racing)]:
        comeback = objective.ranked(returning)[0]
        dropped.remove(comeback)
        racing = objective.ranked([*racing, *judge_more([comeback], comeback.prompts[-1], prompts)])
    return [*racing, *dropped]


def _with(entrant: Entrant[T], new: T, reached: int) -> Entrant[T]:
    total = entrant.judged[-1] + new if entrant.judged else new
    return Entrant(entrant.index, entrant.kl, (*entrant.judged, total), (*entrant.prompts, reached))
