"""What quantisation leaves of an edit: an entry of the record, and work/survival/FORMAT.json."""

from __future__ import annotations

from abliterator.record._measured import Behaviour, BehaviourSide, Divergence, Frozen, Side


class SurvivingStrength(Frozen):
    """The effective strengths and leaks of one component, over the blocks that were edited.

    Both are of the quantised edit against the base that is not quantised (`EffectiveStrength`).

    Attributes:
        component: kind of the writers, such as "attention".
        blocks: blocks in which it was edited.
        built: median strength of the edit before it was quantised.
        low: smallest strength in the format.
        median: of the strengths in the format.
        high: largest strength in the format.
        leak_built: median leak of the edit before it was quantised.
        leak: median leak in the format.
        leak_high: largest leak in the format.
    """

    component: str
    blocks: int
    built: float
    low: float
    median: float
    high: float
    leak_built: float
    leak: float
    leak_high: float


class Survival(Frozen):
    """Base and edited, both quantised to one format, and measured as the build was.

    `built` and `behaviour` are of the same target prompts, so each change is paired by prompt.

    Attributes:
        format: as it was asked for, such as "Q4_K_M".
        label: what it stores, in words.
        tool: what quantised, with its version.
        commands: the same with that tool alone; each works on a folder of one side.
        answered_by: what answered in that format.
        limit: prompts of each set at most; None for all of the build's.
        bytes: weights of the edited model in the format.
        bytes_built: weights of the edited model as it was built.
        built: behaviour of base and edited before they were quantised.
        behaviour: behaviour of base and edited in the format.
        change: in the format minus before, by side.
        divergence: KL(base || edited), both in the format.
        rounding: KL(before || in the format), by side.
        strengths: of each edited component.
        withheld: why divergence and strengths were not measured; None where they were.
    """

    format: str
    label: str
    tool: str
    commands: tuple[str, ...]
    answered_by: str
    limit: int | None = None
    bytes: int
    bytes_built: int
    built: Behaviour
    behaviour: Behaviour
    change: dict[Side, BehaviourSide]
    divergence: Divergence | None = None
    rounding: dict[Side, Divergence] = {}
    strengths: tuple[SurvivingStrength, ...] = ()
    withheld: str | None = None
