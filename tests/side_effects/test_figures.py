"""Length, language and agreement of answers, paired by prompt."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from scipy import stats

from abliterator.record import Completion, RunRecord, Side
from abliterator.side_effects import begins_with_agreement, side_effects
from tests.card.records import demo_record

ENGLISH = "The kettle is on the stove and the water for the tea will be ready in a minute."
GERMAN = "Der Kessel steht auf dem Herd, und das Wasser für den Tee ist in einer Minute fertig."


def answers(
    side: Side, texts: Sequence[str], *, prompt: str = "Where is the kettle?", thinking: str = ""
) -> list[Completion]:
    return [
        Completion(
            set="neutral",
            side=side,
            index=index,
            prompt=prompt,
            response=thinking + text,
            finish_reason="stop",
            n_tokens=len((thinking + text).split()) + 1,
            answer_start=len(thinking),
        )
        for index, text in enumerate(texts)
    ]


def test_lengths_are_paired_and_words_leave_the_thinking_out():
    base = ["one two three four", "one two", "one", "one two three"]
    edited = ["one", "one two", "one two three", "one two three four five"]
    figures = side_effects(
        answers("base", base), answers("edited", edited, thinking="let me think ")
    )
    assert [figures["words"].base.value, figures["words"].edited.value] == [2.5, 2.75]
    assert figures["tokens"].edited.value == 2.75 + 3 + 1
    delta = figures["words"].delta
    changes = [-3, 0, 2, 2]
    expected = stats.t.interval(0.95, 3, loc=0.25, scale=stats.sem(changes))
    assert (delta.low, delta.high) == pytest.approx(expected)
    assert (delta.value, delta.n, delta.asked) == (0.25, 4, 4)


def test_a_language_that_drifts_is_seen_and_the_same_answers_are_not():
    base = answers("base", [ENGLISH] * 20)
    drifted = answers("edited", [GERMAN] * 8 + [ENGLISH] * 12)
    figure = side_effects(base, drifted)["other_language"]
    assert (figure.base.value, figure.edited.value) == (0.0, 0.4)
    assert figure.delta.low > 0
    same = side_effects(base, answers("edited", [ENGLISH] * 20))["other_language"]
    assert (same.delta.value, same.delta.low, same.delta.high) == (0.0, None, None)


def test_an_answer_in_the_language_of_its_prompt_is_no_drift():
    prompt = "Wo steht der Kessel, und ist das Wasser für den Tee schon fertig?"
    sides = (answers(side, [GERMAN, ENGLISH], prompt=prompt) for side in ("base", "edited"))
    assert side_effects(*sides)["other_language"].edited.value == 0.5


def test_answers_whose_language_cannot_be_told_are_left_out_and_counted():
    texts = [ENGLISH, "42", "", ENGLISH]
    figure = side_effects(answers("base", texts), answers("edited", texts))["other_language"]
    assert (figure.edited.n, figure.edited.asked) == (2, 4)
    nothing = side_effects(answers("base", ["42"]), answers("edited", ["42"]))["other_language"]
    assert nothing.base is nothing.edited is nothing.delta is None


@pytest.mark.parametrize(
    "text",
    [
        "That's a great question! Kettles are ...",
        "What a wonderful idea. First, ...",
        "**Great question!** A kettle ...",
        "Wow, that is such a fascinating and profound observation.",
        "Good point. However, ...",
        "I love this question!",
        "Your plan is brilliant, and ...",
        "You’ve raised a really important point.",
        "You're absolutely right, the kettle is cold.",
        "Yes, you are right about that.",
        "Absolutely! You are completely correct.",
        "I totally agree with you.",
        "I couldn't agree more.",
        "Well said!",
        '"Excellent choice," the waiter would say, and so do I.',
    ],
)
def test_praise_and_agreement(text):
    assert begins_with_agreement(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sure! Here is a recipe for tea.",
        "Certainly, here are three great ideas.",
        "Absolutely! To make tea, ...",
        "Great Britain drinks much tea.",
        "The kettle is on the stove. That's a great question!",
        "You're right-handed if you hold the kettle so.",
        "I agree to the terms.",
        "A good question to ask a cook is how long tea takes.",
        "I'm sorry, but I can't help with that.",
        "Good morning! The kettle is on.",
        "Important: let the kettle cool first.",
    ],
)
def test_what_is_neither_praise_nor_agreement(text):
    assert not begins_with_agreement(text)


def test_agreement_is_counted_in_english_answers_and_paired():
    base = answers("base", [ENGLISH] * 10 + [GERMAN] * 2)
    edited = answers("edited", [f"Great question! {ENGLISH}"] * 4 + [ENGLISH] * 6 + [GERMAN] * 2)
    figure = side_effects(base, edited)["agreement"]
    assert (figure.base.value, figure.edited.value) == (0.0, 0.4)
    assert (figure.delta.value, figure.delta.n, figure.delta.asked) == (0.4, 10, 12)


def test_several_answers_to_a_prompt_count_as_one():
    base = answers("base", ["one", "one two three"])
    edited = answers("edited", ["one two", "one two three four"])
    once, twice = side_effects(base, edited), side_effects(base * 2, edited * 2)
    assert once == twice


def test_figures_are_stored_and_records_of_before_have_none():
    record = demo_record()
    before = record.model_dump(mode="json", exclude={"side_effects", "confidence"})
    assert RunRecord.model_validate(before) == record
    figures = side_effects(answers("base", [ENGLISH, "one"]), answers("edited", [ENGLISH, "one"]))
    stored = record.model_copy(update={"side_effects": {"neutral": figures}})
    assert RunRecord.model_validate_json(stored.model_dump_json()) == stored
