"""Verdicts by group: which group is named, with what figures, and how often one is by chance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from abliterator.groups import group_verdicts
from abliterator.judge import summarise
from abliterator.record import Grouping, RunRecord, Side, Verdict
from tests.card.records import demo_record

FIVE = [f"group {index // 20}" for index in range(100)]  # five groups of twenty prompts


def verdicts(
    side: Side, refused: Sequence[object], compliance: Sequence[float | None] | None = None
) -> list[Verdict]:
    grades = compliance or [0.0 if refuses else 1.0 for refuses in refused]
    return [
        Verdict(
            set="target",
            side=side,
            index=index,
            compliance=grade,
            coherence=None if grade is None else 1.0,
            refused=None if grade is None else bool(refuses),
            truncated=False,
            kind=None if grade is None else "refused" if refuses else "complied",
        )
        for index, (refuses, grade) in enumerate(zip(refused, grades, strict=True))
    ]


BASE = verdicts("base", [True] * 95 + [False] * 5)


def by_category(edited: Sequence[Verdict], names: Sequence[str | None] = FIVE) -> Grouping:
    (grouping,) = group_verdicts(BASE, edited, {"category": names})
    return grouping


def test_the_one_refusing_group_of_five_is_named_and_its_interval_excludes_the_mean():
    refused = [(index // 20 == 1 and index % 10 > 0) or index in (0, 99) for index in range(100)]
    grouping = by_category(verdicts("edited", refused))
    assert {(o.column, o.group) for o in grouping.outliers} == {("category", "group 1")}
    named = next(o for o in grouping.outliers if o.measure == "refusal")
    assert (named.edited.value, named.edited.n, named.edited.asked) == (0.9, 20, 20)
    assert named.overall.value == 0.2
    assert named.edited.low > named.overall.value
    assert named.p_holm < 1e-10
    assert [group.refused("edited") for group in grouping.groups] == [1, 18, 0, 0, 1]


def test_without_such_a_group_none_is_named():
    refused = [index % 5 == 0 for index in range(100)]
    assert by_category(verdicts("edited", refused)).outliers == []


def test_by_chance_a_group_is_named_in_at_most_one_set_of_twenty():
    """The expected number is 2 of 40 at most; perf/groups.py draws thousands."""
    rng = np.random.default_rng(0)
    named = 0
    for _ in range(40):
        refused = rng.random(100) < 0.2
        grades = [0.0 if r else float(rng.choice([0.5, 1.0])) for r in refused]
        named += bool(by_category(verdicts("edited", refused, grades)).outliers)
    assert named <= 2


def test_a_groups_figures_are_those_of_its_prompts_alone():
    rng = np.random.default_rng(1)
    refused = rng.random(100) < 0.3
    grades = [0.0 if r else float(rng.choice([0.5, 1.0])) for r in refused]
    edited = verdicts("edited", refused, grades)
    group = by_category(edited).groups[2]
    alone = summarise(*(side[40:60] for side in (BASE, edited)))
    for measure, values in group.measures.items():
        assert values.base.value == getattr(alone.base, measure).value
        assert values.delta == getattr(alone.delta, measure)
        assert values.p_delta == alone.p_value[measure]
    assert group.measures["refusal"].edited == alone.edited.refusal
    assert group.kinds == alone.kinds


def test_p_values_hold_for_all_groups_columns_and_measures_together():
    edited = verdicts("edited", [index < 12 for index in range(100)])
    halves = ["first" if index < 50 else "second" for index in range(100)]
    groupings = group_verdicts(BASE, edited, {"category": FIVE, "half": halves, "one": ["x"] * 100})
    assert [grouping.column for grouping in groupings] == ["category", "half"]
    cells = [m for g in groupings for group in g.groups for m in group.measures.values()]
    assert len(cells) == 21
    smallest = min(cells, key=lambda m: m.p_rest)
    assert smallest.p_rest_holm == pytest.approx(21 * smallest.p_rest)


def test_prompts_without_a_group_belong_to_the_rest():
    names = ["a"] * 50 + ["b"] * 25 + [None] * 25
    grouping = by_category(verdicts("edited", [index >= 75 for index in range(100)]), names)
    assert grouping.ungrouped == 25
    assert [group.asked for group in grouping.groups] == [50, 25]
    assert grouping.overall["refusal"].value == 0.25
    assert grouping.groups[0].measures["refusal"].p_rest < 1e-6


@pytest.mark.parametrize(("unscored", "is_withheld"), [(1, False), (2, True), (20, True)])
def test_groups_with_answers_that_have_no_verdict(unscored, is_withheld):
    grades = [None if 20 <= index < 20 + unscored else 1.0 for index in range(100)]
    refusal = by_category(verdicts("edited", [False] * 100, grades)).groups[1].measures["refusal"]
    assert (refusal.edited is None) == (refusal.delta is None) == is_withheld
    assert (refusal.p_rest is None) == is_withheld
    if not is_withheld:
        assert (refusal.edited.n, refusal.edited.asked) == (19, 20)


def test_prompts_that_resemble_each_other_are_not_counted_as_independent():
    """Clusters of ten that answer alike, at random: counted as prompts, groups seem to differ."""
    rng = np.random.default_rng(2)
    clusters = [index // 10 for index in range(100)]
    named = {"prompts": 0, "clusters": 0}
    for _ in range(20):
        alike = rng.random(10) < 0.4
        edited = verdicts("edited", [alike[cluster] for cluster in clusters])
        for unit, of in (("prompts", None), ("clusters", clusters)):
            (grouping,) = group_verdicts(BASE, edited, {"category": FIVE}, clusters=of)
            named[unit] += bool(grouping.outliers)
    assert named["clusters"] <= 2 < 10 < named["prompts"]


def test_clusters_of_one_prompt_each_change_no_test():
    edited = verdicts("edited", [index // 20 == 1 for index in range(100)])
    (alone,) = group_verdicts(BASE, edited, {"category": FIVE}, clusters=range(100))
    plain = by_category(edited)
    for one, other in zip(alone.groups, plain.groups, strict=True):
        for measure, values in one.measures.items():
            assert values.p_rest == other.measures[measure].p_rest
            assert values.edited.value == other.measures[measure].edited.value


def test_several_answers_to_a_prompt_count_as_one_prompt():
    once = verdicts("edited", [index % 4 == 0 for index in range(100)])
    (grouping,) = group_verdicts(BASE * 3, once * 3, {"category": FIVE})
    assert grouping == by_category(once).model_copy(update={"groups": grouping.groups})
    single = by_category(once).groups[0].measures
    assert grouping.groups[0].measures == single


def test_records_of_before_have_no_groups_and_those_with_groups_read_back():
    record = demo_record()
    before = record.model_dump(mode="json", exclude={"groups"})
    assert RunRecord.model_validate(before) == record
    grouping = by_category(verdicts("edited", [index % 4 == 0 for index in range(100)]))
    grouped = record.model_copy(update={"groups": {"target": (grouping,)}})
    assert RunRecord.model_validate_json(grouped.model_dump_json()) == grouped
