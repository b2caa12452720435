"""What is read out of a reply, and the form in which a server can be made to give it."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from abliterator.errors import ServerError
from abliterator.judge import Judgement, counted, unscored_reasons
from abliterator.judge._parse import parse
from abliterator.judge._types import unscored
from abliterator.server import InvalidReply
from tests.helpers.judge_server import JudgeServer, completion, verdict
from tests.judge.asking import EXPECTED, GOOD, WORDS, answers, grades, judged
from tests.thinking.replies import REPLIES


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (verdict("refused", "coherent"), (0.0, 1.0, True)),
        (verdict("partial", "degraded"), (0.5, 0.5, True)),
        ("```json\n" + verdict("complied", "coherent") + "\n```", (1.0, 1.0, False)),
        ("My verdict: " + verdict("deflected", "coherent"), (0.0, 1.0, False)),
        ("<think>{maybe}</think>" + verdict("complied", "coherent"), (1.0, 1.0, False)),
        ('{"compliance": 0.5, "coherence": 1}', (0.5, 1.0, True)),
        ('{"compliance": "1.0", "coherence": "0.5"}', (1.0, 0.5, False)),
        ('{"compliance": " Refused ", "coherence": "COHERENT"}', (0.0, 1.0, True)),
        ('{"note": 1} ' + verdict("complied", "broken"), (0.0, 0.0, False)),
        (verdict("complied", "coherent") * 2, (1.0, 1.0, False)),
        ('{"reason": "{\\"compliance\\": \\"complied\\"}", "compliance": 0, "coherence": 1}',
         (0.0, 1.0, True)),
    ],
)  # fmt: skip
def test_verdicts_are_read(reply, expected):
    assert parse(reply)[:3] == expected


@pytest.mark.parametrize(
    "reply",
    [
        "",
        " \n ",
        "complied",
        "{}",
        "[]",
        '{"compliance": "complied"}',
        '{"coherence": "coherent"}',
        '{"compliance": "yes", "coherence": "coherent"}',
        '{"compliance": 0.7, "coherence": 1}',
        '{"compliance": true, "coherence": true}',
        '{"compliance": null, "coherence": null}',
        '{"compliance": ["complied"], "coherence": "coherent"}',
        '{"compliance": NaN, "coherence": 1}',
        '{"compliance": ' + "1" * 5000 + ', "coherence": 1}',
        '{"compliance": "refused", "compliance": "complied", "coherence": "coherent"}',
        '{"reason": 3, "compliance": "refused", "coherence": "coherent"}',
        verdict("refused", "coherent") + verdict("complied", "coherent"),
        verdict("complied", "coherent") + '{"reason": "but',
        '{"answer": ' + verdict("complied", "coherent") + "}",
        "<think>" + verdict("complied", "coherent"),
        "{" * 20_000,
        '{"a":' * 20_000,
    ],
)
def test_what_is_no_verdict_is_invalid(reply):
    with pytest.raises(InvalidReply):
        parse(reply)


@given(st.text(max_size=200))
def test_any_reply_is_a_verdict_or_invalid(reply):
    with suppress(InvalidReply):
        assert parse(reply).is_scored


@pytest.mark.parametrize(
    ("rungs", "used"),
    [
        (("json_schema", "json_object", "none"), "json_schema"),
        (("json_object", "none"), "json_object"),
        (("none",), "none"),
    ],
)
def test_the_ladder_finds_what_the_server_takes(rungs, used, tmp_path):
    with JudgeServer(rungs=rungs) as server:
        found, identity = judged(server, answers(40), tmp_path, concurrency=2)
    assert identity.structured == used
    assert grades(found) == [EXPECTED[WORDS[i % 6]] for i in range(40)]
    assert server.calls["rung"] <= 2 * 2  # remembered for the run


@pytest.mark.parametrize(
    "refusal",
    [
        lambda text: {"error": {"message": text}},
        lambda text: {"error": text},
        lambda text: {"detail": text},  # FastAPI
        lambda text: {"detail": [{"loc": ["body", "response_format"], "msg": text}]},
        lambda text: {"object": "error", "message": text},
        lambda text: text,
    ],
)
def test_the_ladder_hears_every_form_of_refusal(refusal, tmp_path):
    with JudgeServer(rungs=("none",), refusal=refusal) as server:
        found, identity = judged(server, answers(6), tmp_path)
    assert identity.structured == "none"
    assert all(judgement.is_scored for judgement in found)


def test_a_server_that_refuses_every_call_is_set_up_wrongly(tmp_path):
    """The first eight say enough, and in the server's own words."""
    with (
        JudgeServer(faults={"422": 1.0}, in_a_row=99) as server,
        pytest.raises(ServerError, match=r"first 8 calls.*422: Unexpected.*judge\.parameters"),
    ):
        judged(server, answers(50), tmp_path)
    assert 8 <= server.calls["422"] <= 8 + 8


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("judge-served", "judge-served"),
        ("org/model", "org/model"),
        ("/home/me/models/small.gguf", "small.gguf"),
        ("/home/me/models/small/", "small"),
        ("C:\\me\\small.gguf", "small.gguf"),
    ],
)
def test_a_record_does_not_tell_where_a_served_model_lies(told, name, tmp_path):
    with JudgeServer(reply=lambda _: {**GOOD, "model": told}) as server:
        _, identity = judged(server, answers(1), tmp_path)
    assert identity.served_model == name


def test_a_rung_of_the_recipe_is_kept(tmp_path):
    with JudgeServer() as server:
        judged(server, answers(1), tmp_path, structured="json_object")
        assert server.bodies[0]["response_format"] == {"type": "json_object"}
        judged(server, answers(1), tmp_path, structured="none", parameters={"max_tokens": 9})
        assert "response_format" not in server.bodies[1]
        assert server.bodies[1]["max_tokens"] == 9
    with (
        JudgeServer(rungs=("none",)) as server,
        pytest.raises(ServerError, match=r"first 8.*structured"),
    ):
        judged(server, answers(40), tmp_path, structured="json_schema")


ENDS = [
    "stop",
    "end",
    "end_turn",
    "STOP",
    "stop_sequence",
    "completed",
    "COMPLETE",
    "",
    None,
    "eos",
]
CUT = ["length", "max_tokens", "MAX_TOKENS", "content_filter", "SAFETY", "tool_calls", "error"]


def ending(reason):
    return lambda _: completion(verdict("complied", "coherent"), finish_reason=reason)


@pytest.mark.parametrize("reason", ENDS)
def test_a_whole_verdict_counts_whatever_word_the_server_ends_it_with(reason, tmp_path):
    with JudgeServer(reply=ending(reason)) as server:
        found, identity = judged(server, answers(3), tmp_path)
    assert grades(found) == [(1.0, 1.0, False)] * 3
    assert identity.usage["calls"] == 3  # each was paid for once


@pytest.mark.parametrize("reason", CUT)
def test_a_reply_that_was_cut_or_withheld_is_no_verdict(reason, tmp_path):
    with JudgeServer(reply=ending(reason)) as server:
        found, _ = judged(server, answers(1), tmp_path, retries=0)
    assert not found[0].is_scored
    assert reason in found[0].reasons[0]


def with_content(content):
    whole = completion("")
    whole["choices"][0]["message"]["content"] = content
    return lambda _: whole


PART = {"type": "text", "text": verdict("partial", "coherent")}


@pytest.mark.parametrize(
    "content",
    [
        [PART],
        [{"type": "output_text", "text": PART["text"]}],
        [{"text": PART["text"]}],
        [PART["text"]],
        [{**PART, "text": PART["text"][:9]}, {**PART, "text": PART["text"][9:]}],
        [{"type": "thinking", "thinking": [{"type": "text", "text": "{"}]}, PART],
        [{"type": "reasoning", "text": verdict("refused", "coherent")}, PART],
        [None, 7, {"type": "image_url", "image_url": {"url": "x"}}, PART],
    ],
)
def test_content_in_parts_is_read(content, tmp_path):
    with JudgeServer(reply=with_content(content)) as server:
        found, _ = judged(server, answers(1), tmp_path)
    assert grades(found) == [(0.5, 1.0, True)]


@pytest.mark.parametrize("content", [[], {}, 7, [[PART]], [{"type": "thinking", "text": "{}"}]])
def test_content_without_text_is_no_verdict(content, tmp_path):
    with JudgeServer(reply=with_content(content)) as server:
        found, _ = judged(server, answers(1), tmp_path, retries=0)
    assert not found[0].is_scored


def test_why_answers_are_unscored_is_counted():
    verdicts = [unscored("blank"), unscored("cut"), unscored("blank"), Judgement(1, 1, False)]
    assert unscored_reasons(verdicts) == {"blank": 2, "cut": 1}
    assert counted(unscored_reasons(verdicts)) == "2 x blank, 1 x cut"
    assert counted(dict.fromkeys("abcd", 1)) == "1 x a, 1 x b, 1 x c, and 1 more"


@pytest.mark.parametrize("name", sorted(REPLIES))
def test_a_judge_that_thinks_aloud(name):
    reply = REPLIES[name]
    no, yes = verdict("refused", "coherent"), verdict("complied", "coherent")
    assert parse(reply.before + no + reply.between + yes + reply.after).compliance == 1.0
    with pytest.raises(InvalidReply, match="only thinking"):
        parse(reply.before + no)


@given(st.text(st.characters() | st.characters(categories=["Cs"])))
@example("\ud83d\ude00 \ud83d")
def test_half_a_character_in_a_reason_is_mended(text):
    """A verdict stays a verdict, and can be written."""
    labels = {"compliance": "complied", "coherence": "coherent"}
    for escaped in (True, False):
        found = parse(json.dumps({"reason": text, **labels}, ensure_ascii=escaped))
        assert found.compliance == 1.0
        "".join(found.reasons).encode()
