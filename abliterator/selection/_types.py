"""Settings of a selection, and the prompts by which it scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from abliterator.evaluation import RenderedPrompts

# answer tokens along which distributions are compared; the first is the prompt's own
KL_TOKENS = 4

Schedule = Callable[[int, int, int], Sequence[tuple[int, int]]]


@dataclass(frozen=True)
class Gates:
    """Limits that a candidate must keep before its answers are judged.

    Attributes:
        max_kl: nats, at most, on neutral prompts.
        min_induce: rise of the refusal score, at least, when the direction is added.
    """

    max_kl: float = 0.1
    min_induce: float = 0.0


@dataclass(frozen=True)
class Search:
    """Settings of a selection.

    Attributes:
        gates: what a candidate must pass.
        survivors: candidates whose answers are judged.
        schedule: of so many candidates and prompts, and how many candidates must reach the end: the
            candidates and prompts of each rung, the last with all prompts.
        controls: draws of random directions and of shuffled labels beside each stack.
        seed: of intervals, of random directions, and of the order of the prompts.
    """

    gates: Gates = Gates()
    survivors: int = 4
    schedule: Schedule = lambda candidates, prompts, least: [(candidates, prompts)]
    controls: int = 3
    seed: int = 0


class ScoringPrompts(NamedTuple):
    """Prompts by which candidates are scored before any answer is judged.

    Attributes:
        target: prompts that show the behaviour; directions may have been taken from them.
        contrast: prompts like target on which the behaviour does not show.
    """

    target: RenderedPrompts
    contrast: RenderedPrompts
