"""What a selection asks for, and what it found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from abliterator.bake import EditPlan
from abliterator.directions import Place
from abliterator.record import Estimate, Frozen

if TYPE_CHECKING:
    from abliterator.judge import Judge
    from abliterator.model import LoadedModel


Schedule = Callable[[int, int, int], Sequence[tuple[int, int]]]


@dataclass(frozen=True)
class Gates:
    """What a candidate must pass before its answers are judged.

    Attributes:
        max_kl: nats, at most, on neutral prompts.
        min_induce: rise of the refusal score, at least, when the direction is added.
    """

    max_kl: float = 0.1
    min_induce: float = 0.0


@dataclass(frozen=True)
class Search:
    """How much is tried, and what decides.

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


@dataclass(frozen=True)
class Asked:
    """Prompts and their rendered token ids, in one order."""

    prompts: Sequence[str]
    token_ids: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Subject:
    """The loaded base, how it would be edited, and the prompts on which candidates are tried.

    Attributes:
        loaded: the base model; it is never reloaded, and its weights never change.
        plan: which writers are edited and how strongly.
        blocks: module paths of all blocks, in order.
        target: prompts for the cheap scores; directions may have been taken from them.
        contrast: prompts like target on which the behaviour does not show.
        neutral: prompts whose answers must stay as they were.
        held_out: target prompts whose answers are judged; no direction was taken from them.
        judge: who judges them.
        max_new_tokens: of a judged answer.
        batch_size: rows answered together, each of which may be edited in its own way.
        max_batch_tokens: tokens in one forward pass.
    """

    loaded: LoadedModel
    plan: EditPlan
    blocks: Sequence[str]
    target: Asked
    contrast: Asked
    neutral: Asked
    held_out: Asked
    judge: Judge
    max_new_tokens: int
    batch_size: int
    max_batch_tokens: int


class Answers(Frozen):
    """What a judge says of the answers to the held-out target prompts."""

    refusal: Estimate | None
    compliance: Estimate | None
    coherence: Estimate | None
    product: Estimate | None  # mean of compliance x coherence, per prompt
    tokens: int  # generated, all answers together


class Rung(Frozen):
    """How a candidate did on the first prompts of a race."""

    prompts: int
    product: Estimate | None


class Candidate(Frozen):
    """One direction: cheap scores, the gates that stopped it, and answers if it was judged.

    `bypass` is the mean log-odds of a refusing opening on target prompts under the edit (lower is
    better), `kl` that of the next-token distributions along the base's answers to neutral prompts
    (nats, per token), `induce` the rise of the log-odds on contrast prompts when the direction is
    added at its layer. `answers` are to the prompts of the last of its `rungs`.
    """

    layer: int
    position: int = -1
    bypass: float
    kl: float
    induce: float
    stopped_by: tuple[str, ...] = ()
    answers: Answers | None = None
    rungs: tuple[Rung, ...] = ()

    @property
    def place(self) -> Place:
        """Where its direction is from."""
        return Place(self.layer, self.position)


class Stack(Frozen):
    """k directions together, against fewer and against as many that know nothing.

    Controls are means over `draws` of them. KL is that of neutral answers, in nats: a control with
    a large one has broken the model.
    """

    k: int
    layers: tuple[int, ...]
    positions: tuple[int, ...] = ()
    kl: float
    answers: Answers
    draws: int = 1
    random: Answers  # the same number of random directions
    random_kl: float | None = None
    shuffled: Answers | None = None  # the same number of directions from shuffled labels
    shuffled_kl: float | None = None
    over_random: Estimate | None  # paired difference of the products
    over_shuffled: Estimate | None = None
    over_smaller: Estimate | None = None

    def broken(self, control_kl: float | None, max_kl: float) -> bool:
        """Whether a control moved neutral answers further than this stack does, and than it may."""
        return control_kl is not None and control_kl > max(max_kl, self.kl)


class Structure(Frozen):
    """How the candidates' directions lie to one another."""

    layers: tuple[int, ...]
    position: int = -1  # of the directions whose cosines these are
    cosines: tuple[tuple[float, ...], ...]
    participation_ratio: float  # of the layers that were judged, or given
    verdict: str  # "single direction" or "low-rank subspace"
    because: str


class Base(Frozen):
    """The base on the same prompts."""

    bypass: float
    answers: Answers


class Selection(Frozen):
    """What was chosen and on what evidence."""

    layers: tuple[int, ...]  # in order of preference
    positions: tuple[int, ...]  # of each of them
    k: int
    why: str
    base: Base
    candidates: tuple[Candidate, ...] = ()
    stacks: tuple[Stack, ...] = ()
    structure: Structure
    rollout_tokens: int  # all that was generated
