"""Results of a study of edits: work/studies/NAME.json."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from abliterator.record._measured import BehaviourSide, Divergence, Estimate, Frozen


class StudyRow(Frozen):
    """One edit measured, or the base."""

    name: str
    layers: tuple[int, ...] = ()  # whose directions are removed
    contrast: Literal["generic", "paired"] | None = None
    alpha: float | None = None
    answers: BehaviourSide
    delta: BehaviourSide | None = None  # to the base, paired by prompt; None for the base itself
    divergence: Divergence | None = None  # from the base


class ContrastDifference(Frozen):
    """The same layer by a paired and by a generic contrast, on the same prompts."""

    layer: int
    cosine: float  # of the two directions
    delta: BehaviourSide  # paired - generic


class Agreement(Frozen):
    """One layer's direction from left-padded batches, against one prompt at a time."""

    layer: int
    apart: Estimate  # 1 - cosine of the two
    length: float  # of the first over that of the second
    halves: float  # cosine of the second from two halves of the prompts: the effect of sampling


class Study(Frozen):
    """The result of a study; `about` has the model, the settings and numbers of prompts."""

    name: str
    asks: str
    about: dict[str, str | int | tuple[int, ...]] = Field(default_factory=dict)
    rows: tuple[StudyRow, ...] = ()
    differences: tuple[ContrastDifference, ...] = ()
    agreements: tuple[Agreement, ...] = ()
