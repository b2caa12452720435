"""Controls: the same edit along directions that know nothing of the behaviour.

One draw says little. Where answers hang by a thread, a random direction tips some of them one way
or the other, and two draws differ by as much as a stack gains. So there are several draws of each
kind, and a prompt counts as the mean of what it is worth under them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import mean

from abliterator.record import Estimate, Verdict
from abliterator.selection._scores import Judged, product
from abliterator.selection._types import Answers
from abliterator.statistics import mean_interval


@dataclass(frozen=True)
class Control:
    """Several draws of one kind, all on the same prompts.

    Attributes:
        draws: judged answers under each.
        kl: nats that neutral answers moved, mean over the draws.
    """

    draws: tuple[Judged, ...]
    kl: float

    @property
    def products(self) -> list[float | None]:
        """Compliance x coherence of each prompt, mean over draws."""
        return list(self._each_prompt(product))

    @property
    def summary(self) -> Answers:
        """All draws in figures; intervals are over prompts, not over answers."""

        def estimated(score: Callable[[Verdict], float | None]) -> Estimate | None:
            known = [value for value in self._each_prompt(score) if value is not None]
            return Estimate.of(mean_interval(known))

        return Answers(
            refusal=estimated(lambda v: float(bool(v.refused)) if v.kind else None),
            compliance=estimated(lambda v: (v.compliance or 0.0) if v.kind else None),
            coherence=estimated(lambda v: (v.coherence or 0.0) if v.kind else None),
            product=estimated(product),
            tokens=sum(judged.tokens for judged in self.draws),
        )

    def _each_prompt(self, score: Callable[[Verdict], float | None]) -> Iterator[float | None]:
        for verdicts in zip(*(judged.verdicts for judged in self.draws), strict=True):
            known = [value for value in map(score, verdicts) if value is not None]
            yield mean(known) if known else None
