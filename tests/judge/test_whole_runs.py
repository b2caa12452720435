"""The API judge against a loopback server that speaks the real protocol, and fails."""

from __future__ import annotations

import pytest

from abliterator.judge import OpenAIJudge, judge_completions, summarise
from abliterator.judge._openai import judge_prompt
from abliterator.recipe import Prices
from abliterator.record import Completion
from tests.helpers.judge_server import FENCED, JudgeServer, verdict
from tests.judge.asking import EXPECTED, GOOD, WORDS, answers, grades, judged, settings


def test_every_answer_gets_the_verdict_of_the_server(tmp_path):
    with JudgeServer() as server:
        found, identity = judged(server, answers(12), tmp_path)
    assert grades(found) == [EXPECTED[WORDS[i % 6]] for i in range(12)]
    assert found[0].reasons == ("So it reads.",)
    assert (identity.kind, identity.model, identity.served_model) == (
        "openai",
        "small",
        "judge-served",
    )
    assert (identity.fingerprints, identity.structured) == (("fp_1",), "json_schema")
    assert identity.prompt_sha256 == judge_prompt().sha256
    assert identity.usage["calls"] == 12


FAULTS = {
    "429": 0.05,
    "500": 0.05,
    "drop": 0.02,
    "slow": 0.02,
    "malformed": 0.01,
    "fenced": 0.01,
    "blank": 0.01,
    "html": 0.01,
    "content_filter": 0.01,
}


def test_500_verdicts_through_every_fault(tmp_path):
    """None lost, none counted twice, and the figures of a run without faults."""
    with JudgeServer() as calm:
        expected, _ = judged(calm, answers(500), tmp_path / "calm")
    with JudgeServer(faults=FAULTS) as server:
        found, identity = judged(server, answers(500), tmp_path / "faults")
    assert all(server.calls[fault] for fault in FAULTS)
    assert found == expected
    assert grades(expected) == [EXPECTED[WORDS[i % 6]] for i in range(500)]
    assert sum(server.answered.values()) == 500  # as many verdicts as answers: none paid twice
    assert identity.usage["calls"] == 500 + sum(
        server.calls[fault] for fault in ("malformed", "blank", "content_filter")
    )


@pytest.mark.parametrize("fault", ["malformed", "blank", "content_filter", "length"])
def test_what_never_becomes_a_verdict_is_unscored(fault, tmp_path):
    with JudgeServer(faults={fault: 1.0}, in_a_row=99) as server:
        found, _ = judged(server, answers(3), tmp_path, retries=1)
    assert [judgement[:3] for judgement in found] == [(None, None, None)] * 3
    assert "2 invalid replies" in found[0].reasons[0]
    assert server.calls[fault] == 6


CHOICE = GOOD["choices"][0]


@pytest.mark.parametrize(
    "body",
    [
        [],
        None,
        3,
        {},
        {**GOOD, "choices": []},
        {**GOOD, "choices": {}},
        {**GOOD, "choices": "none"},
        {**GOOD, "choices": [None]},
        {**GOOD, "choices": [{**CHOICE, "message": None}]},
        {**GOOD, "choices": [{**CHOICE, "message": {"role": "assistant", "content": None}}]},
        {**GOOD, "choices": [{**CHOICE, "message": {"role": "assistant", "content": [1]}}]},
        {**GOOD, "choices": [{**CHOICE, "message": {"content": "", "refusal": "No."}}]},
        {**GOOD, "choices": [{**CHOICE, "finish_reason": ["stop"], "message": "complied"}]},
    ],
)
def test_a_body_that_is_no_completion_is_unscored(body, tmp_path):
    with JudgeServer(reply=lambda _: body) as server:
        found, _ = judged(server, answers(1), tmp_path)
    assert not found[0].is_scored
    assert found[0].reasons[0].startswith("unscored: ")


@pytest.mark.parametrize(
    "odd",
    [
        {"usage": None},
        {"usage": "many"},
        {"usage": {"prompt_tokens": "a", "prompt_tokens_details": 3, "completion_tokens": None}},
        {"model": None, "system_fingerprint": 3},
        {"choices": [{**CHOICE, "finish_reason": None}]},
        {"extra": {"more": 1}},
        "bare",
    ],
)
def test_what_a_server_says_beside_the_verdict_may_be_odd(odd, tmp_path):
    bare = {"choices": [{"message": {"content": verdict("complied", "coherent")}}]}
    body = bare if odd == "bare" else {**GOOD, **odd}
    with JudgeServer(reply=lambda _: body) as server:
        found, _ = judged(server, answers(1), tmp_path, prices=Prices(input=1.0, output=1.0))
    assert grades(found) == [(1.0, 1.0, False)]


def test_a_fresh_marker_for_every_attempt(tmp_path):
    with JudgeServer(faults={"blank": 1.0}, in_a_row=2) as server:
        found, _ = judged(server, answers(1), tmp_path)
    assert grades(found) == [EXPECTED["No"]]
    markers = {FENCED.search(body["messages"][1]["content"])[1] for body in server.bodies}
    assert len(markers) == len(server.bodies) == 3


def test_few_unscored_are_named_and_many_withhold_the_rates(tmp_path):
    def reply(body):
        number = int(body["messages"][1]["content"].split("answer ")[2].split(".")[0])
        return "I would rather not say." if number < 3 else verdict("complied", "coherent")

    def rollouts(side, response):
        return [
            Completion(
                set="target",
                side=side,
                index=i,
                prompt=f"Question {i}?",
                response=f"{response} answer {i}.",
                finish_reason="stop",
                n_tokens=4,
            )
            for i in range(100)
        ]

    with JudgeServer(reply=reply) as server:
        judge = OpenAIJudge(settings(server, retries=0), cache=tmp_path / "c.sqlite")
        asked = rollouts("base", "Yes is") + rollouts("edited", "Well is")
        verdicts = judge_completions(asked, judge)
    behaviour = summarise(verdicts[:100], verdicts[100:])
    assert behaviour.base.unscored.value == 0.03
    assert behaviour.base.refusal is None
    assert behaviour.delta.compliance is None
