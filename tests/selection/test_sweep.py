"""Which candidates survive: gates, halving, ties."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abliterator.errors import DirectionError
from abliterator.recipe import Selection
from abliterator.selection import _sweep
from tests.selection.scripted import candidate, sweep


def test_answers_decide_among_the_survivors_and_gates_come_first(context, scripted):
    scores = [
        candidate(1, bypass=-9, kl=0.5),  # the best bypass, but it moves everything
        candidate(2, bypass=-3),
        candidate(3, bypass=-2),
        candidate(4, bypass=-1),
        candidate(5, bypass=-5, induce=-1),
    ]
    scripted(scores, lambda layers, k: [1.0, 1.0] if layers == (3,) else [0.5, 0.0])
    found = sweep(context, 5)
    assert [c.layer for c in found] == [3, 2, 4, 1, 5]
    assert [c.stopped_by for c in found[3:]] == [("max_kl",), ("min_induce",)]
    assert [c.answers is not None for c in found] == [True, True, False, False, False]


def test_ties_go_to_the_lower_kl(context, scripted):
    scores = [candidate(1, bypass=-2, kl=0.09), candidate(2, bypass=-1, kl=0.01)]
    scripted(scores, lambda layers, k: [1.0, 0.5])
    assert [c.layer for c in sweep(context, 2)] == [2, 1]


def test_most_candidates_answer_few_prompts(context, scripted):
    """8 candidates on 4 prompts, 4 on 8, 2 on 16; an answer is asked for once."""
    asked = []

    def products(layers, k):
        asked.append(layers)
        (layer,) = layers
        return [1.0 if layer > i % 8 else 0.0 for i in range(16)]

    scripted([candidate(i, bypass=-i) for i in range(1, 9)], products)
    found = sweep(context, 8, n_judged=8, prompts=16, rungs=(4, 8))
    assert [c.layer for c in found[:2]] == [8, 7]
    assert [len(c.rungs) for c in found] == [3, 3, 2, 2, 1, 1, 1, 1]
    assert [r.prompts for r in found[0].rungs] == [4, 8, 16]
    assert [c.answers.product.n for c in found] == [16, 16, 8, 8, 4, 4, 4, 4]
    assert sum(c.answers.tokens for c in found) == 7 * (4 * 8 + 4 * 4 + 8 * 2)
    assert found[0].answers.product.value == 1.0


def test_who_dropped_out_comes_back_where_the_leader_was_lucky(context, scripted):
    """Candidate 2 answers only the prompts of the first rung; 1 is second there, 3 last."""
    lucky = random.Random(0).sample(range(16), 16)[:4]

    def products(layers, k):
        (layer,) = layers
        steady = [1.0 if i in lucky[1:] or i not in lucky else 0.0 for i in range(16)]
        return {1: steady, 2: [float(i in lucky) for i in range(16)], 3: [0.0] * 16}[layer]

    scripted([candidate(i) for i in (1, 2, 3)], products)
    found = sweep(context, 3, n_judged=3, prompts=16, rungs=(4,), keep=0.3)
    assert [c.layer for c in found] == [1, 2, 3]
    assert [c.answers.product.n for c in found] == [16, 16, 4]
    assert [r.prompts for r in found[0].rungs] == [4, 16]
    assert sum(c.answers.tokens for c in found) == 7 * (16 + 16 + 4)


@given(
    st.lists(st.integers(1, 40), max_size=4, unique=True).map(sorted),
    st.floats(0.05, 1),
    st.integers(1, 30),
    st.integers(1, 32),
    st.integers(1, 5),
)
def test_a_schedule_ends_with_all_prompts_and_at_least_those_that_are_stacked(
    rungs, keep, candidates, prompts, least
):
    found = Selection(rungs=tuple(rungs), keep=keep).schedule(candidates, prompts, least)
    assert found[0][0] == candidates
    assert found[-1][1] == prompts
    assert found[-1][0] >= min(candidates, least)
    for (n, few), (fewer, more) in itertools.pairwise(found):
        assert n >= fewer >= 1
        assert few < more


@given(
    st.lists(
        st.tuples(st.floats(0.11, 5), st.floats(-5, 5, allow_subnormal=False)),
        min_size=1,
        max_size=5,
    )
)
def test_what_the_nearest_is_said_to_need_is_enough(found):
    import re

    gates = Selection()
    tried = [candidate(i + 1, kl=kl, induce=induce) for i, (kl, induce) in enumerate(found)]
    tried = [c.model_copy(update={"stopped_by": _sweep.stopped_by(c, gates)}) for c in tried]
    text = _sweep.none_passed(tried, gates)
    named = int(re.search(r"nearest is layer (\d+)", text)[1])
    values = dict(re.findall(r"selection\.(\w+)=(\S+)", text.replace(". Lower", " Lower")))
    moved = Selection(**{k: float(v) for k, v in values.items()})
    assert _sweep.stopped_by(tried[named - 1], moved) == ()
    for c in tried:
        assert all(re.search(rf"`{gate}`.*\b{c.layer} \(", text) for gate in c.stopped_by)


def test_fewer_survivors_than_k():
    passing = [candidate(1), candidate(2).model_copy(update={"stopped_by": ("max_kl",)})]
    _sweep.require_enough(passing, 1)
    with pytest.raises(DirectionError, match="only 1 of 2 candidate layers"):
        _sweep.require_enough(passing, 2)
