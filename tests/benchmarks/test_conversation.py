"""The conversation suite: its conversations, and grading that is exact without a model."""

import json
import re
from pathlib import Path

import pytest
import yaml

from abliterator.benchmarks.conversation import (
    ITEMS,
    SKILLS,
    Check,
    calls_in,
    items_of,
    max_new_tokens,
    passes,
)

TRANSCRIPTS = yaml.safe_load(Path(__file__).with_name("transcripts.yaml").read_text("utf-8"))


def test_there_are_enough_transcripts_of_either_truth():
    truths = [transcript["right"] for transcript in TRANSCRIPTS]
    assert len(truths) >= 40
    assert min(truths.count(True), truths.count(False)) >= 15


@pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=lambda transcript: transcript["said"][-1])
def test_grades_are_those_given_by_hand(transcript):
    check = Check.model_validate(transcript["check"])
    answer, truncated = transcript["said"][-1], transcript.get("cut", False)
    assert passes(check, answer, truncated=truncated) is transcript["right"]


@pytest.mark.parametrize("skill", SKILLS)
def test_every_skill_has_conversations_of_its_own(skill):
    items = items_of(skill)
    assert len({item.prompt for item in items}) == len(items) == ITEMS
    assert all(item.check != Check() for item in items)
    holes = re.compile(r"\{\w+(:int)?\}")
    assert not any(holes.search(m["content"]) for item in items for m in item.prompt.messages)
    assert 0 < max_new_tokens(skill) <= 100


@pytest.mark.parametrize("skill", SKILLS)
def test_half_of_the_conversations_give_the_answers_before_the_last(skill):
    turns = [len(item.prompt.turns) for item in items_of(skill)]
    assert 8 <= turns.count(1) <= 10
    assert len(set(turns)) == 2


def test_a_fact_is_asked_for_after_ten_turns():
    roles = [[m["role"] for m in item.prompt.messages] for item in items_of("recall")]
    assert {of_item.count("user") for of_item in roles} == {12}


def test_given_answers_show_the_format_that_is_asked_for():
    """Each of them passes the check that its own request would have."""
    shown = [item for item in items_of("format") if len(item.prompt.turns) == 1]
    for item in shown:
        own = item.check.model_dump(exclude_defaults=True)
        for answer in (m["content"] for m in item.prompt.messages if m["role"] == "assistant"):
            if "numbered" in own:
                assert passes(Check(numbered=len(answer.splitlines())), answer)
            elif "bullets" in own:
                assert passes(Check(bullets=len(answer.splitlines())), answer)
            elif "json_value" in own:
                assert passes(Check(json_value=json.loads(answer)), answer)
            else:
                assert passes(Check(listed=answer.removesuffix(".")), answer)


@pytest.mark.parametrize("skill", SKILLS)
def test_what_the_user_says_does_not_pass_the_check(skill):
    """A model that repeats the question is not right by it."""
    for item in items_of(skill):
        assert not passes(item.check, item.prompt.messages[-1]["content"]), item


def test_tools_are_described_where_a_template_has_no_place_for_them():
    item = items_of("tools")[0]
    assert not item.described.tools
    assert all(name in item.described.messages[0]["content"] for name in item.prompt.tool_names)
    assert item.described.messages[1:] == item.prompt.messages[1:]


@pytest.mark.parametrize(
    "reply",
    [
        '[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}]',
        '{"type": "function", "function": {"name": "f", "arguments": "{\\"x\\": 1}"}}',
        'Sure.\n<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>',
        'commentary to=functions.f json{"x": 1}',
        '<function=f>{"x": 1}</function>',
        "[f(x=1)]",
    ],
)
def test_calls_are_read_in_every_form(reply):
    (call,) = calls_in(reply)
    assert (call.name, call.arguments) == ("f", {"x": 1})


@pytest.mark.parametrize("reply", ["f(x=1)", "[f(x=open('y'))]", "{}", "[1, 2]", "no call", "{{{["])
def test_other_replies_hold_no_call(reply):
    assert calls_in(reply) == []
