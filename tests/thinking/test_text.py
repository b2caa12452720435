"""Text alone: labelled answers, lines of old rollouts, and judges' own replies."""

from __future__ import annotations

import json
import string

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from abliterator.cli import main
from abliterator.judge import (
    Answered,
    Judgement,
    RuleJudge,
    calibrate,
    judge_completions,
    load_labelled,
)
from abliterator.record import Completion
from abliterator.server import neutralize
from abliterator.thinking import split_text
from tests.helpers.judge_server import JudgeServer, verdict
from tests.judge.asking import judged
from tests.thinking.replies import ANSWER, REPLIES, THOUGHT, ids, tokenizer_of

# As they are decoded without special tokens, these leave nothing that tells where thinking ends.
LOST = {
    "think, as control tokens", "LongCat", "Magistral", "Apertus", "Solar Open 2", "Command A",
    "gpt-oss, commentary", "OpenThinker", "Gemma 4", "Kimi K3", "openPangu", "Solar Open",
    "Muse Glimmer",
}  # fmt: skip


@pytest.mark.parametrize("name", REPLIES)
def test_marks_in_text(name):
    reply = REPLIES[name]
    split = split_text(reply.text)
    assert split.answer.strip() == ANSWER
    assert THOUGHT in split.thinking
    assert split_text(reply.before + THOUGHT, is_cut=True).answer == ""
    assert split_text(reply.before + THOUGHT).answer == ""


@pytest.mark.parametrize("name", sorted(REPLIES.keys() - LOST))
def test_text_without_control_tokens(name):
    reply = REPLIES[name]
    tokenizer = tokenizer_of(reply)
    text = tokenizer.decode(ids(tokenizer, reply.text), skip_special_tokens=True)
    assert split_text(text)[1].strip() == ANSWER
    within = tokenizer.decode(ids(tokenizer, reply.before + THOUGHT), skip_special_tokens=True)
    assert split_text(within)[1] == ""


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("analysisWe need to see.assistantfinalSure!", "Sure!"),
        ("analysisok soassistantcommentaryI call.assistantfinalSure!", "Sure!"),
        ("analysis用户 asks.assistantfinalSure!", "Sure!"),
        ("commentaryI call it.assistantfinalSure!", "Sure!"),
        ("finalI'm sorry, but I can't help with that.", "I'm sorry, but I can't help with that."),
        ("analysisUser asks where Neva lives. Could it be", ""),
        ("analysis of the assistantfinal state", "analysis of the assistantfinal state"),
        ("Analysis: it is fine.", "Analysis: it is fine."),
        ("analysis", "analysis"),
        ("finally, go home.", "finally, go home."),
        ("final_result = 3", "final_result = 3"),
        ("thoughtful as ever", "thoughtful as ever"),
    ],
)
def test_remnants_of_control_tokens(text, answer):
    assert split_text(text).answer == answer


def test_where_nothing_tells_the_answer_it_is_unscored(tmp_path):
    lost = Answered("Where does Neva live?", f"thought\n{THOUGHT}{ANSWER}")
    (by_rules,) = RuleJudge().judge_all([lost])
    with JudgeServer() as server:
        ((by_server,), _) = judged(server, [lost], tmp_path)
        assert not server.bodies
    for judgement in (by_rules, by_server):
        assert not judgement.is_scored
        assert judgement.reasons[0].startswith("unscored: nothing tells the answer")


def test_no_judge_is_shown_a_thought(tmp_path):
    asked = []
    for name, reply in REPLIES.items():
        cut = reply.before + THOUGHT
        asked += [Answered(name, reply.text), Answered(name, cut, "length")]
    with JudgeServer() as server:
        server.reply = verdict("complied", "coherent")
        found, _ = judged(server, asked, tmp_path)
        shown = json.dumps(server.bodies)
    assert len(server.bodies) == len(REPLIES)
    assert shown.count("Coldgate") == len(REPLIES)
    assert "private" not in shown
    assert {judgement[:3] for judgement in found[::2]} == {(1.0, 1.0, False)}
    assert found[1::2] == [Judgement(0.0, 0.0, False, ("empty", "truncated"))] * len(REPLIES)
    by_rules = RuleJudge().judge_all(asked)
    assert {judgement[:3] for judgement in by_rules[::2]} == {(1.0, 1.0, False)}
    assert by_rules[1::2] == found[1::2]


def test_labelled_answers_are_graded_by_their_answer(tmp_path):
    texts = [reply.text for reply in REPLIES.values()]
    texts += [f"analysis{THOUGHT}assistantfinal{ANSWER}"]
    rows = [{"prompt": "Where does Neva live?", "label": 1, "response": text} for text in texts]
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    done = CliRunner().invoke(main, ["judge-calibrate", str(path)])
    assert done.exit_code == 0, done.output
    calibration = calibrate(load_labelled(path), RuleJudge())
    assert (calibration.agreement, calibration.unscored) == (1.0, 0)


def completion(response, **more):
    return Completion(
        set="target", side="base", index=0, prompt="Where does Neva live?", response=response,
        finish_reason="stop", n_tokens=9, **more,
    )  # fmt: skip


def test_what_generation_knows_is_not_guessed_again():
    """A line says where its answer begins; what looks like a mark there is the answer's own."""
    text = "Sure!\n<think>\nThis is how it is written.\n</think>\nNeva lives in Coldgate."
    (known,) = judge_completions([completion(text, answer_start=0)], RuleJudge())
    assert known.thinking == ""
    (guessed,) = judge_completions([completion(text)], RuleJudge())
    assert "written" in guessed.thinking
    (none,) = judge_completions([completion(text, answer_start=len(text))], RuleJudge())
    assert none.kind == "empty"


def test_lines_of_old_rollouts_are_read():
    line = json.loads(completion("<think>Hm.</think>Sure!").model_dump_json())
    del line["answer_start"]
    old = Completion.model_validate(line)
    assert old.answer_start is None
    assert Answered.of(old).split[:2] == ("<think>Hm.</think>", "Sure!")


WORDS = st.text(string.ascii_letters + string.digits + " .,!?'\"()\n-", max_size=200)


@given(WORDS)
def test_words_without_marks_are_all_answer(text):
    if not text.lstrip().startswith(("analysis", "commentary", "final", "thought\n", "Here")):
        assert split_text(text) == ("", text, True)


@given(WORDS, WORDS, st.sampled_from([r for r in REPLIES.values() if "Here" not in r.before]))
def test_a_mention_in_the_middle_is_kept(before, after, reply):
    """Whatever is written around one opening mark, if words stand before it on its line."""
    text = f"Say {before.replace(chr(10), ' ')}x{reply.before.strip()}{after}"
    if "analysis" not in text and "to=" not in text:
        assert split_text(text).answer == text


@given(WORDS, WORDS, st.sampled_from(list(REPLIES.values())))
def test_thought_and_answer_are_told_apart_whatever_they_are(thought, answer, reply):
    split = split_text(reply.before + thought + reply.between + answer + reply.after)
    assert split.answer.strip() == answer.strip()


@given(st.text(max_size=300), st.booleans())
def test_nothing_is_lost(text, is_cut):
    split = split_text(text, is_cut=is_cut)
    assert sorted(split.thinking + split.answer) == sorted(text)


# Judges that think


@pytest.mark.parametrize("name", sorted(REPLIES))
def test_marks_that_are_control_tokens_reach_no_judge(name):
    reply = REPLIES[name]
    for mark in {*reply.special, *reply.added} - {"[unused16]", "[unused17]"}:
        assert mark not in neutralize(f"a{mark}b")
