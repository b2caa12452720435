"""The normal form: which spellings are one prompt, and which are near each other."""

from __future__ import annotations

import random
import sys
import time
from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from abliterator.errors import PromptError
from abliterator.prompts import (
    check_distinct,
    comparison_key,
    count_alike,
    count_near,
    drop_near,
    near_duplicates,
    nearly_equal,
    normalised,
    repeats,
    similarity,
    trigrams,
)
from tests.prompts.test_prompts import prompt_set, texts


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("Straße", "STRASSE"),
        ("ﬁne", "fine"),
        ("caf\u00e9", "cafe\u0301"),
        (" a \u00a0\n b\u2003", "A B"),
    ],
)
def test_spelling_that_says_the_same_is_the_same(a, b):
    assert normalised(a) == normalised(b)


@pytest.mark.parametrize(("a", "b"), [("a b", "ab"), ("resume", "résumé"), ("Who?", "Who")])
def test_spelling_that_may_say_something_else_is_not(a, b):
    assert normalised(a) != normalised(b)


@pytest.mark.parametrize(
    "variant",
    [
        "Tell me, please: what does Neva's aunt cook",
        "“Tell me please: what does Neva’s aunt cook?”",
        "«tell me please; what does Neva´s aunt cook ?»",
        "TELL\u00a0me, please – what does Neva's aunt cook?!",
        "- Tell me please... what does Neva‘s aunt cook？",
        "\ufeffTell me pl\u00adease: what d\u200boes Neva\u2060's aunt cook?\u200e",
        "Tell me please: what does Neva's aunt cook?\ufe0f\U000e0041",
        "¿Tell me (please): what does 'Neva's' aunt cook…",
        "Ｔｅｌｌ ｍｅ please: what\x1fdoes Neva`s aunt cook。\x07",
    ],
)
def test_prompts_that_differ_in_what_nobody_reads_are_the_same(variant):
    plain = "Tell me please: what does Neva's aunt cook?"
    assert comparison_key(variant) == comparison_key(plain)
    with pytest.raises(PromptError, match="are the same 1 prompts"):
        check_distinct(prompt_set(plain), prompt_set(variant, name="neutral"))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        *[("Write it in C#", "Write it in C"), ("Write it in C++", "Write it in C")],
        *[("What is -5 squared?", "What is 5 squared?"), ("Pay $5", "Pay 5"), ("3-2", "32")],
        *[("Set an alarm for 6 hours", "Set an alarm for 7 hours"), ("a b", "b a")],
        *[("Do lock it", "Don't lock it"), ("resume", "résumé"), ("?", "!"), ("@neva", "neva")],
    ],
)
def test_prompts_that_ask_for_something_else_are_not_the_same(a, b):
    assert comparison_key(a) != comparison_key(b)


@given(texts)
def test_a_comparison_key_is_its_own(text):
    key = comparison_key(text)
    assert comparison_key(key) == key


grams = st.lists(st.text(alphabet="ab c", min_size=1, max_size=12), max_size=12)


@given(grams, grams, st.sampled_from([0.3, 0.5, 0.75, 0.9, 1.0]))
def test_near_duplicates_are_those_of_the_plain_definition(prompts, others, threshold):
    def alike(one, other):
        sides = (trigrams(comparison_key(text)) for text in (one, other))
        return similarity(*sides) >= threshold

    expected = [i for i, one in enumerate(prompts) if any(alike(one, o) for o in others)]
    assert near_duplicates(prompts, others, threshold=threshold) == expected


@pytest.mark.parametrize(
    ("a", "b", "near"),
    [
        (
            "Please write a poem about the sea at night.",
            "Write a poem about the sea at night.",
            True,
        ),
        ("Set an alarm for 6 hours.", "Set an alarm for 7 hours.", True),
        ("Write a song about the mountains.", "Write a poem about the sea.", False),
        ("Where does Neva live?", "What does Lorin like to cook?", False),
    ],
)
def test_near_duplicates_are_counted_and_stay(a, b, near):
    kept = count_near(prompt_set(a), [prompt_set("Boil rice.", b, name="evaluation")])
    assert (kept.prompts, kept.near) == ((a,), int(near))


REQUEST = "Take a picture of the old bridge!"


@pytest.mark.parametrize(
    "other",
    [
        "take a PICTURE of the old bridge",
        "Take a picture of the new bridge.",
        "Take a picture of the bridge",
        "Please: take a picture of the old bridge!",
        "Of the old bridge, take a picture",
        "Take a picture of the 12 bridge",
        "Take a picture, of the old 'bridge'?!",
    ],
)
def test_one_word_case_punctuation_and_order_make_no_other_prompt(other):
    assert nearly_equal([other, "Boil rice."], [REQUEST]) == [0]
    assert nearly_equal([REQUEST], ["Boil rice.", other]) == [0]
    assert repeats(["Boil rice.", REQUEST, other]) == [2]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (REQUEST, "Take a photo of the new bridge!"),  # two words
        ("Who is Neva?", "Who is Lorin?"),  # too few words in common
        ("Where does Neva live?", "Where does Lorin live?"),
        (REQUEST, "Mach ein Foto der alten Brücke!"),
        (REQUEST, "Photograph that ancient crossing."),
    ],
)
def test_what_is_not_found(a, b):
    assert nearly_equal([a], [b]) == repeats([a, b]) == []


words = st.lists(st.sampled_from(["a", "b", "c", "dd", "ee"]), max_size=7).map(" ".join)


@given(st.lists(words, max_size=7), st.lists(words, max_size=7))
def test_nearly_equal_is_alike_in_letters_or_in_all_words_but_one(prompts, others):
    def near(one, other):
        alike = similarity(trigrams(comparison_key(one)), trigrams(comparison_key(other))) >= 0.75
        left, right = Counter(one.split()), Counter(other.split())
        least = min((left - right).total(), (right - left).total())
        most = max((left - right).total(), (right - left).total())
        return alike or ((left & right).total() >= 4 and least <= most <= 1)

    expected = [i for i, one in enumerate(prompts) if any(near(one, o) for o in others)]
    assert nearly_equal(prompts, others) == expected
    earlier = [i for i, one in enumerate(prompts) if any(near(one, o) for o in prompts[:i])]
    assert repeats(prompts) == earlier


def test_near_duplicates_are_dropped_and_counted_where_that_is_asked():
    training = prompt_set("Boil rice.", REQUEST, "Who is Neva?")
    measured = prompt_set("Take a picture of the new bridge.", name="evaluation")
    left = drop_near(training, [measured])
    assert (left.prompts, left.dropped, left.near_dropped) == (("Boil rice.", "Who is Neva?"), 1, 1)
    assert count_near(left, [measured]).near == 0
    assert count_alike(training).alike == 0
    with pytest.raises(PromptError, match=r"All 1 target prompts .* nearly equal an evaluation"):
        drop_near(prompt_set(REQUEST), [measured])


@pytest.mark.slow
def test_many_prompts_are_compared_in_seconds():
    """A line per prompt pair would be minutes; templated prompts, which all share much."""
    numbers = random.Random(0)
    prompts = [
        f"Set an alarm for {numbers.randrange(10**6)} hours and {numbers.randrange(10**4)} minutes."
        for _ in range(25_500)
    ]
    start = time.process_time()
    near_duplicates(prompts[:25_000], prompts[25_000:])
    nearly_equal(prompts[:25_000], prompts[25_000:])
    assert time.process_time() - start < 60


@given(texts)
@example("\u0345\u0301")
def test_normalising_twice_changes_nothing(text):
    assert normalised(normalised(text)) == normalised(text)


def test_normalising_any_character_twice_changes_nothing():
    characters = map(chr, range(sys.maxunicode + 1))
    assert [c for c in characters if normalised(f"a{c}") != normalised(normalised(f"a{c}"))] == []
