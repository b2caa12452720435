"""Controls: the same edit along directions that are independent of the behaviour.

One draw is noisy. Where the base nearly refuses or nearly answers, a random direction changes some
answers, and two draws differ by as much as a stack gains. So there are several draws of each kind,
and a prompt counts as the mean of its products under them.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean

from abliterator.evaluation import JudgedAnswers, summarise_draws
from abliterator.record import AnswerSummary


@dataclass(frozen=True)
class Control:
    """Several draws of one kind, all on the same prompts.

    Attributes:
        draws: judged answers under each.
        kl: nats on neutral answers, mean over the draws.
    """

    draws: tuple[JudgedAnswers, ...]
    kl: float

    @property
    def products(self) -> list[float | None]:
        """Compliance x coherence of each prompt, mean over draws."""
        columns = zip(*(judged.products for judged in self.draws), strict=True)
        scored = ([value for value in column if value is not None] for column in columns)
        return [mean(prompt) if prompt else None for prompt in scored]

    @property
    def summary(self) -> AnswerSummary:
        """Estimates over all draws; intervals are over prompts, not over answers."""
        return summarise_draws(self.draws)
