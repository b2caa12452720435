"""Behaviour by group of prompts, such as the values of a column `category`."""

from __future__ import annotations

from typing import Literal

from abliterator.record._measured import Estimate, Frozen, Side, VerdictKind

GroupedMeasure = Literal["refusal", "compliance", "coherence"]
LEVEL = 0.05  # of all tests of one prompt set's groups together


class GroupMeasure(Frozen):
    """One measure of one group. Holm's p-values hold for all groups and measures of the set."""

    base: Estimate | None
    edited: Estimate | None
    delta: Estimate | None  # edited - base, paired by prompt
    p_delta: float | None = None  # of an exact paired test of the delta
    p_delta_holm: float | None = None
    p_rest: float | None = None  # permutation test: edited, this group against all other prompts
    p_rest_holm: float | None = None


class Group(Frozen):
    """One group of a prompt set."""

    name: str
    asked: int  # prompts of the group that were put to both models
    answers: int  # of the edited model to them
    measures: dict[GroupedMeasure, GroupMeasure]
    kinds: dict[Side, dict[VerdictKind, int]] = {}

    def refused(self, side: Side) -> int:
        """Answers of one side that are refusals as a whole."""
        return self.kinds.get(side, {}).get("refused", 0)


class Outlier(Frozen):
    """A group that differs from the other prompts of its set in one measure of the edited model."""

    column: str
    group: str
    measure: GroupedMeasure
    edited: Estimate  # of the group; its interval excludes `overall`
    overall: Estimate  # of all prompts of the set
    p_holm: float


class Grouping(Frozen):
    """The groups of a prompt set by one column."""

    column: str
    ungrouped: int  # prompts with an empty cell
    overall: dict[GroupedMeasure, Estimate | None]  # edited, all prompts of the set
    groups: tuple[Group, ...]

    def kinds(self, side: Side) -> dict[str, dict[VerdictKind, int]]:
        """How often each kind of verdict was given on one side, by group."""
        return {group.name: group.kinds.get(side, {}) for group in self.groups}

    @property
    def outliers(self) -> list[Outlier]:
        """Where a group differs from the rest (Holm, 5 %), and its interval excludes the mean.

        Without any difference between groups, one is named in at most 5 % of prompt sets.
        """
        return [
            Outlier(
                column=self.column,
                group=group.name,
                measure=measure,
                edited=values.edited,
                overall=overall,
                p_holm=values.p_rest_holm,
            )
            for group in self.groups
            for measure, values in group.measures.items()
            if (overall := self.overall[measure]) is not None
            and values.edited is not None
            and values.p_rest_holm is not None
            and values.p_rest_holm < LEVEL
            and values.edited.low is not None
            and values.edited.high is not None
            and not values.edited.low <= overall.value <= values.edited.high
        ]
