"""Held-out prompts, and prompts that two sets share."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abliterator.errors import PromptError
from abliterator.prompts import (
    PromptSet,
    check_distinct,
    comparison_key,
    drop_overlap,
    hold_out,
)
from tests.prompts.test_prompts import SECRET, fractions, prompt_lists, prompt_set

# Splitting


@given(prompt_lists, fractions, st.integers())
def test_hold_out_partitions_and_keeps_the_order(prompts, fraction, seed):
    both = hold_out(prompt_set(*prompts), fraction=fraction, seed=seed)
    training, held_out = (list(side.prompts) for side in both)
    assert training == [prompt for prompt in prompts if prompt not in held_out]
    assert held_out == [prompt for prompt in prompts if prompt not in training]
    assert sorted(training + held_out) == sorted(prompts)
    assert abs(len(held_out) - len(prompts) * fraction) <= 1
    assert both[0].name == "target"
    assert both[1].name == "target_held_out"


@given(prompt_lists.flatmap(lambda p: st.tuples(st.just(p), st.permutations(p))), fractions)
def test_hold_out_does_not_depend_on_the_order_of_the_file(orders, fraction):
    first, second = (hold_out(prompt_set(*order), fraction=fraction, seed=1) for order in orders)
    assert set(first[1].prompts) == set(second[1].prompts)


def test_hold_out_depends_on_the_seed_and_on_nothing_else():
    prompts = prompt_set(*(f"prompt {i}" for i in range(100)))
    chosen = [set(hold_out(prompts, fraction=0.3, seed=seed)[1].prompts) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert all(len(side) == 30 for side in chosen)
    # golden: a build that is resumed by a later version must split in the same way
    assert sorted(chosen[0])[:5] == [f"prompt {i}" for i in (1, 10, 11, 13, 14)]


def test_spellings_of_one_prompt_land_on_one_side():
    prompts = prompt_set(*(text for i in range(20) for text in (f"Prompt {i}", f"PROMPT  {i}")))
    training, held_out = hold_out(prompts, fraction=0.5, seed=0)
    check_distinct(training, held_out)
    assert len(training.prompts) == len(held_out.prompts) == 20


@pytest.mark.parametrize("prompts", [("a",), ("a", "A ")])
def test_one_prompt_cannot_be_split(prompts):
    with pytest.raises(PromptError, match="only one different prompt"):
        hold_out(prompt_set(*prompts), fraction=0.5, seed=0)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_a_fraction_outside_0_and_1_is_refused(fraction):
    with pytest.raises(PromptError, match="fraction of target prompts to hold out"):
        hold_out(prompt_set("a", "b"), fraction=fraction, seed=0)


# Overlap


def test_sets_that_share_nothing_pass():
    check_distinct(prompt_set("a", "b"), prompt_set("c", name="neutral"))


@pytest.mark.parametrize(
    ("a", "b", "seen"),
    [
        ((SECRET, "b"), ("B", SECRET), "are the same 2 prompts"),
        ((SECRET, "b", "c"), (SECRET.upper(), "d"), "share 1 prompts, of 3 and 2"),
        ((SECRET, "b", "c"), (SECRET, "b"), "share 2 prompts, of 3 and 2"),
    ],
)
def test_sets_that_share_prompts_are_refused_with_counts(a, b, seen):
    with pytest.raises(PromptError, match=seen) as raised:
        check_distinct(prompt_set(*a), prompt_set(*b, name="neutral"))
    assert "from target.txt" in str(raised.value)
    assert "from neutral.txt" in str(raised.value)
    assert "teapots" not in str(raised.value).lower()


@given(prompt_lists, prompt_lists)
def test_drop_overlap_leaves_exactly_the_others(training, evaluation):
    keys = {comparison_key(prompt) for prompt in evaluation}
    expected = [prompt for prompt in training if comparison_key(prompt) not in keys]
    a, b = prompt_set(*training), prompt_set(*evaluation, name="evaluation")
    if not expected:
        with pytest.raises(PromptError, match="none is left to learn from"):
            drop_overlap(a, b)
        return
    left = drop_overlap(a, b)
    assert list(left.prompts) == expected
    assert left.dropped == left.overlap == len(training) - len(expected)
    check_distinct(left, b)


def test_drop_overlap_adds_to_what_was_dropped_and_can_leave_nothing():
    before = PromptSet(name="target", prompts=("a", "b", "c"), source="s", dropped=4)
    after = drop_overlap(before, prompt_set("A", "ｃ"))
    assert (after.dropped, after.overlap) == (6, 2)
    with pytest.raises(PromptError, match="All 3 target prompts"):
        drop_overlap(before, prompt_set("c", "b", "a"))
