"""Results of a study of edits: work/studies/NAME.json."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from abliterator.record._measured import BehaviourSide, Divergence, Estimate, Frozen


class StudyRow(Frozen):
    """One edit measured, or the base."""

    name: str
    layers: tuple[int, ...] = ()  # whose directions are removed
    k: int | None = None  # directions removed of one block; None where that is the layers' number
    contrast: Literal["generic", "paired"] | None = None
    alpha: float | None = None
    of: str | None = None  # the subspace, of which other rows have other strengths
    scale: float | None = None  # factor on all strengths, where a study has several
    answers: BehaviourSide
    delta: BehaviourSide | None = None  # to the base, paired by prompt; None for the base itself
    divergence: Divergence | None = None  # from the base


class ContrastDifference(Frozen):
    """The same layer by a paired and by a generic contrast, on the same prompts."""

    layer: int
    cosine: float  # of the two directions
    delta: BehaviourSide  # paired - generic


class EditDifference(Frozen):
    """An edit less the one that a study compares with, at the same strength, paired by prompt."""

    name: str
    delta: BehaviourSide
    kl_first_token: Estimate | None  # nats
    kl: Estimate | None


class DirectionCosines(Frozen):
    """Cosines of an estimate with that of the edit compared with, layer by layer from 1."""

    name: str
    cosines: tuple[float, ...]


class Agreement(Frozen):
    """One layer's direction from left-padded batches, against one prompt at a time."""

    layer: int
    apart: Estimate  # 1 - cosine of the two
    length: float  # of the first over that of the second
    halves: float  # cosine of the second from two halves of the prompts: the effect of sampling


class NullDistribution(Frozen):
    """A statistic of the edit among the same of draws that owe nothing to the behaviour."""

    of: str  # what was drawn: "shuffled labels", "random directions"
    statistic: str  # "product": the mean of compliance x coherence over prompts
    prompts: int
    tokens: int  # of a judged answer, at most
    observed: float  # of the edit
    values: tuple[float, ...]  # of the draws
    p_value: float  # (1 + draws that reach the observed value) / (1 + draws)


class Study(Frozen):
    """The result of a study; `about` has the model, the settings and numbers of prompts."""

    name: str
    asks: str
    about: dict[str, str | int | tuple[int, ...]] = Field(default_factory=dict)
    rows: tuple[StudyRow, ...] = ()
    differences: tuple[ContrastDifference, ...] = ()
    agreements: tuple[Agreement, ...] = ()
    nulls: tuple[NullDistribution, ...] = ()
    compared_with: str | None = None
    edit_differences: tuple[EditDifference, ...] = ()
    cosines: tuple[DirectionCosines, ...] = ()
