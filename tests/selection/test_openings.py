"""How refusals begin: learned from answers, scored as log-odds."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abliterator.engines import TransformersEngine
from abliterator.selection import learn_openings, log_odds
from tests.selection.scripted import PROMPTS


def test_openings_are_what_refusals_have_and_answers_lack():
    refusals = [[1, 2, 3, 9], [1, 2, 3, 8], [1, 2, 4], [7, 7]]
    answers = [[1, 5], [1, 6], [1, 5]]
    # (1) alone opens answers too; (1, 2) opens three refusals, (7) the last one
    assert learn_openings(refusals, answers) == ((1, 2), (7,))


def test_refusals_that_begin_as_answers_do_have_no_opening():
    assert learn_openings([[1, 2], [3]], [[1, 2], [3]]) == ()
    assert learn_openings([[], []], [[1]]) == ()


@given(
    st.lists(st.lists(st.integers(0, 3), max_size=8), min_size=1, max_size=12),
    st.lists(st.lists(st.integers(0, 3), max_size=8), max_size=12),
)
def test_no_opening_begins_another_so_none_is_counted_twice(refusals, answers):
    found = learn_openings(refusals, answers)
    for a in found:
        assert sum(b[: len(a)] == a for b in found) == 1


def test_refusal_score_is_the_log_odds_of_the_openings(tiny_loaded):
    loaded, openings = tiny_loaded(), [(11, 12, 13), (20,)]
    engine = TransformersEngine(loaded)
    found = log_odds(engine.log_likelihoods(PROMPTS, openings, max_batch_tokens=64))
    for prompt, score in zip(PROMPTS, found.tolist(), strict=True):
        p = 0.0
        for opening in openings:
            with torch.no_grad():
                logits = loaded.model(torch.tensor([[*prompt, *opening]])).logits[0].double()
            at = logits.softmax(dim=1)
            p += math.prod(float(at[len(prompt) - 1 + i, token]) for i, token in enumerate(opening))
        assert score == pytest.approx(math.log(p / (1 - p)), abs=1e-4)
