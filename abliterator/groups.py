"""Verdicts by group of prompts: what a mean over all prompts hides.

A column of a prompt set, such as `category` or `language`, divides it into groups. Each has the
rates and means of both sides with intervals and n, the paired difference, and a test of the edited
model's answers against those to all other prompts of the set, adjusted by Holm over all tests.

    groupings = group_verdicts(base_verdicts, edited_verdicts, prompts.groups)
    [outlier.group for grouping in groupings for outlier in grouping.outliers]
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from statistics import mean

from abliterator.judge import scored_verdicts
from abliterator.record import (
    Estimate,
    Group,
    GroupedMeasure,
    Grouping,
    GroupMeasure,
    Side,
    Verdict,
    VerdictKind,
)
from abliterator.statistics import (
    clustered_rate,
    holm,
    mcnemar_exact,
    mean_interval,
    paired_delta,
    rate_interval,
    relabelling_test,
    sign_flip_test,
)

MAX_UNSCORED = 0.02  # share of a group's answers without a verdict from which on, but for one
MEASURES: dict[GroupedMeasure, Callable[[Verdict], float]] = {
    "refusal": lambda verdict: float(bool(verdict.refused)),
    "compliance": lambda verdict: verdict.compliance or 0.0,
    "coherence": lambda verdict: verdict.coherence or 0.0,
}

Clusters = Sequence[Hashable]  # of every prompt of the set
Values = Mapping[int, float]  # of the prompts with a verdict, by index
Cell = tuple[str, str, GroupedMeasure]  # column, group, measure


def group_verdicts(
    base: Sequence[Verdict],
    edited: Sequence[Verdict],
    columns: Mapping[str, Sequence[str | None]],
    *,
    clusters: Clusters | None = None,
    seed: int = 0,
) -> tuple[Grouping, ...]:
    """Behaviour by group, for each column that divides the prompts into at least two.

    The unit is the prompt: where it has several verdicts on a side, their mean counts. Rates carry
    Wilson intervals, means and deltas a bootstrap over prompts. Figures are withheld (None) where
    more than 2 % of the answers of a group, and more than one, have no verdict.

    Args:
        base: verdicts of one prompt set on the base.
        edited: the same of the edited model.
        columns: by name, the group of each prompt of the set by its index; None without one.
        clusters: the cluster of each prompt of the set, where some resemble each other: intervals
            and tests are then over clusters, and a group's means of clusters are compared.
        seed: of bootstrap and random permutations.
    """
    values = {
        measure: (_by_prompt(base, read), _by_prompt(edited, read))
        for measure, read in MEASURES.items()
    }
    indices = sorted({verdict.index for verdict in edited})
    members = _members(indices, columns)
    overall = {
        measure: None
        if _is_withheld(len(indices), len(after))
        else _estimate(after, len(indices), clusters=clusters, seed=seed)
        for measure, (_, after) in values.items()
    }
    measures = _holm_adjusted(
        {
            (column, name, measure): _measure(of_group, *sides, clusters, seed=seed)
            for (column, name), of_group in members.items()
            for measure, sides in values.items()
        }
    )
    return tuple(
        Grouping(
            column=column,
            ungrouped=sum(columns[column][index] is None for index in indices),
            overall=overall,
            groups=tuple(
                Group(
                    name=name,
                    asked=len(of_group),
                    answers=sum(verdict.index in of_group for verdict in edited),
                    measures={measure: measures[column, name, measure] for measure in MEASURES},
                    kinds=_kinds({"base": base, "edited": edited}, of_group),
                )
                for (of_column, name), of_group in members.items()
                if of_column == column
            ),
        )
        for column in dict.fromkeys(column for column, _ in members)
    )


def _members(
    indices: Sequence[int], columns: Mapping[str, Sequence[str | None]]
) -> dict[tuple[str, str], list[int]]:
    """Indices of the prompts by column and group, of columns with at least two groups."""
    members: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for column, names in columns.items():
        groups = {name for index in indices if (name := names[index]) is not None}
        for name in sorted(groups) if len(groups) > 1 else ():
            members[column, name] = [index for index in indices if names[index] == name]
    return members


def _by_prompt(verdicts: Sequence[Verdict], measure: Callable[[Verdict], float]) -> Values:
    """The measure by prompt, of scored verdicts; a prompt with several counts as their mean."""
    by_prompt: defaultdict[int, list[float]] = defaultdict(list)
    for verdict in verdicts:
        if scored_verdicts([verdict]):
            by_prompt[verdict.index].append(measure(verdict))
    return {index: mean(values) for index, values in by_prompt.items()}


def _measure(
    indices: Sequence[int], base: Values, edited: Values, clusters: Clusters | None, *, seed: int
) -> GroupMeasure:
    """One measure of the prompts with these indices, against that of all others."""
    asked, group = len(indices), set(indices)
    before, after = ({i: side[i] for i in indices if i in side} for side in (base, edited))
    rest = {index: value for index, value in edited.items() if index not in group}
    both = [i for i in indices if i in before and i in after]
    pairs = [before[i] for i in both], [after[i] for i in both]
    of_pairs = None if clusters is None else [clusters[i] for i in both]
    has_pairs = not _is_withheld(asked, len(both))
    delta = paired_delta(*pairs, clusters=of_pairs, seed=seed) if has_pairs else None
    estimates = (
        None
        if _is_withheld(asked, len(values))
        else _estimate(values, asked, clusters=clusters, seed=seed)
        for values in (before, after)
    )
    measured, other = (_of_clusters(values, clusters) for values in (after, rest))
    is_compared = rest and not _is_withheld(asked, len(after))
    return GroupMeasure(
        **dict(zip(("base", "edited"), estimates, strict=True)),
        delta=Estimate.of(delta, asked),
        p_delta=_paired_test(*pairs, clusters=of_pairs, seed=seed) if has_pairs else None,
        p_rest=relabelling_test(measured, other, seed=seed) if is_compared else None,
    )


def _is_withheld(asked: int, scored: int) -> bool:
    return scored == 0 or asked - scored > max(1, MAX_UNSCORED * asked)


def _estimate(
    values: Values, asked: int, *, clusters: Clusters | None, seed: int
) -> Estimate | None:
    """A rate where each value is 0 or 1 (its interval holds at 0 and 1), else a mean."""
    data = [*values.values()]
    if clusters is not None:
        return Estimate.of(clustered_rate(data, [clusters[index] for index in values]), asked)
    if _are_flags(data):
        return Estimate.of(rate_interval(int(sum(data)), len(data)), asked)
    return Estimate.of(mean_interval(data, seed=seed), asked)


def _of_clusters(values: Values, clusters: Clusters | None) -> list[float]:
    """The mean of each cluster, in whose prompts answers resemble each other."""
    if clusters is None:
        return [*values.values()]
    of_cluster: defaultdict[Hashable, list[float]] = defaultdict(list)
    for index, value in values.items():
        of_cluster[clusters[index]].append(value)
    return [mean(members) for members in of_cluster.values()]


def _paired_test(
    base: Sequence[float],
    edited: Sequence[float],
    *,
    clusters: Sequence[Hashable] | None,
    seed: int,
) -> float:
    if clusters is None and _are_flags([*base, *edited]):
        return mcnemar_exact([*map(bool, base)], [*map(bool, edited)])
    return sign_flip_test(base, edited, clusters=clusters, seed=seed)


def _are_flags(values: Iterable[float]) -> bool:
    return all(value in (0.0, 1.0) for value in values)


def _kinds(
    sides: Mapping[Side, Sequence[Verdict]], group: Collection[int]
) -> dict[Side, dict[VerdictKind, int]]:
    return {
        side: dict(Counter(v.kind for v in verdicts if v.kind and v.index in group))
        for side, verdicts in sides.items()
    }


def _holm_adjusted(measures: Mapping[Cell, GroupMeasure]) -> dict[Cell, GroupMeasure]:
    """The measures with p-values that hold for all of them together."""
    adjusted: dict[Cell, dict[str, float]] = {cell: {} for cell in measures}
    for test in ("p_delta", "p_rest"):
        tested = {cell: p for cell, m in measures.items() if (p := getattr(m, test)) is not None}
        for cell, p in zip(tested, holm([*tested.values()]), strict=True):
            adjusted[cell][f"{test}_holm"] = p
    return {cell: m.model_copy(update=adjusted[cell]) for cell, m in measures.items()}
