"""What a study is given, and what it finds; JSON both ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from abliterator.bake import EditPlan
from abliterator.record import BehaviourSide, Divergence, Estimate, Frozen

if TYPE_CHECKING:
    from abliterator.judge import Judge
    from abliterator.model import LoadedModel


class Asked(NamedTuple):
    """Prompts and their rendered token ids, in one order."""

    prompts: Sequence[str]
    token_ids: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Subject:
    """The loaded base, how it would be edited, and the prompts on which edits are measured.

    Attributes:
        loaded: the base model; it is never reloaded, and its weights never change.
        plan: which writers are edited, and how strongly.
        blocks: module paths of all blocks, in order.
        target: prompts on which the behaviour shows; no direction was taken from them.
        neutral: prompts on which the divergence is measured.
        judge: who judges the answers to target prompts.
        max_new_tokens: of a judged answer.
        kl_tokens: answer tokens compared of each neutral prompt, at most.
        batch_size: prompts answered together.
        max_batch_tokens: tokens in one forward pass.
        seed: of the intervals.
    """

    loaded: LoadedModel
    plan: EditPlan
    blocks: Sequence[str]
    target: Asked
    neutral: Asked
    judge: Judge
    max_new_tokens: int
    kl_tokens: int
    batch_size: int
    max_batch_tokens: int
    seed: int = 0


class Row(Frozen):
    """One edit measured, or the base."""

    name: str
    layers: tuple[int, ...] = ()  # whose directions are removed
    contrast: Literal["generic", "paired"] | None = None
    alpha: float | None = None
    answers: BehaviourSide
    delta: BehaviourSide | None = None  # to the base, paired by prompt; None for the base itself
    divergence: Divergence | None = None  # from the base


class Difference(Frozen):
    """The same layer by a paired and by a generic contrast, on the same prompts."""

    layer: int
    cosine: float  # of the two directions
    delta: BehaviourSide  # paired - generic


class Agreement(Frozen):
    """One layer's direction from left-padded batches, against one prompt at a time."""

    layer: int
    apart: Estimate  # 1 - cosine of the two
    length: float  # of the first over that of the second
    halves: float  # cosine of the second's own two halves of the prompts: what sampling moves


class Study(Frozen):
    """What a study found; `about` says of what, how, and on how many prompts."""

    name: str
    asks: str
    about: dict[str, Any] = Field(default_factory=dict)
    rows: tuple[Row, ...] = ()
    differences: tuple[Difference, ...] = ()
    agreements: tuple[Agreement, ...] = ()
