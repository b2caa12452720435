"""All of Unicode survives every file of JSON lines, written and read; half a character is mended.

Every code point that a text may have: what other readers take for line ends (U+0085, U+2028), NUL,
quotes, combining and private ones.
"""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st

from abliterator import evaluation
from abliterator.cli import main
from abliterator.errors import JudgeError
from abliterator.files import as_lines, read_lines, write_text_atomic
from abliterator.judge import load_labelled
from abliterator.pairs import WORDS, Candidate, Made, require_ours, save_pairs
from abliterator.pipeline.stages.prompts import PromptSets
from abliterator.prompts import PromptSet, load_prompts
from abliterator.recipe import PairsSpec, Source
from abliterator.record import Completion, Verdict
from abliterator.server import Reply, ReplyCache

SEPARATORS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei\rj\r\nk\0l\x7fm\ufeffn\u00a0o\U0001f600"
texts = st.text(st.characters(exclude_categories=["Cs"]))
EVERYTHING = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("lines") / "file.jsonl"


def answer(prompt, response):
    return Completion(
        set="target",
        side="base",
        index=0,
        prompt=prompt,
        response=response,
        finish_reason="stop",
        n_tokens=1,
    )


def verdict(text):
    return Verdict(
        set="target",
        side="base",
        index=0,
        compliance=1.0,
        coherence=1.0,
        refused=False,
        truncated=False,
        reasons=(text, text),
        kind="complied",
        thinking=text,
    )


@given(texts, texts)
@example(SEPARATORS, SEPARATORS)
@example(EVERYTHING, "")
def test_answers_and_verdicts(place, one, other):
    for kind, values in (
        (Completion, [answer(one, other), answer(other, one)]),
        (Verdict, [verdict(one), verdict(other)]),
    ):
        write_text_atomic(place, as_lines(value.model_dump_json() for value in values))
        assert [kind.model_validate_json(line) for line in read_lines(place)] == values


@given(texts, st.booleans())
@example(SEPARATORS, False)
def test_labelled_answers(place, text, escaped):
    rows = [{"prompt": text, "response": text[::-1], "label": label} for label in (0, 0.5, 1)]
    place.write_bytes("\r\n".join(json.dumps(row, ensure_ascii=escaped) for row in rows).encode())
    found = load_labelled(place)
    assert [row.label for row in found] == [0, 0.5, 1]
    assert {(row.answered.prompt, row.answered.response) for row in found} == {(text, text[::-1])}


def test_half_a_character_in_labelled_answers_is_named(place):
    place.write_text('{"prompt": "a", "response": "b\\ud800", "label": 1}')
    with pytest.raises(JudgeError, match="line 1: half of a surrogate pair"):
        load_labelled(place)


@given(texts, st.booleans())
@example(SEPARATORS, False)
def test_prompts(place, text, escaped):
    text = f"-{text}-".replace("\0", "")
    row = json.dumps({"prompt": text}, ensure_ascii=escaped)
    place.write_bytes(f'{row}\n{{"prompt": "last"}}\n'.encode())
    loaded = load_prompts("target", Source(path=place))
    assert loaded.prompts == (text, "last")
    held_out = PromptSet(name="n", prompts=(text,), source=text)
    sets = PromptSets(extraction={"target": loaded}, evaluation={"target": held_out})
    write_text_atomic(place, sets.model_dump_json(indent=1) + "\n")
    assert PromptSets.model_validate_json(place.read_bytes()) == sets


@given(texts, texts)
@example(SEPARATORS, EVERYTHING)
def test_replies(place, one, other):
    reply = Reply(text=one, finish_reason="stop", model=other, fingerprint=one)
    with ReplyCache(place.with_suffix(".sqlite")) as cache:
        cache.put("key", reply, cost=0.0)
    with ReplyCache(place.with_suffix(".sqlite")) as cache:
        assert cache.get("key") == reply


def spec(**more):
    return PairsSpec(
        behaviour="b", target="t", contrast="c", categories={"all": "x"}, per_category=1, **more
    )


@given(texts, texts)
@example(SEPARATORS, SEPARATORS[::-1])
def test_pairs(place, one, other):
    made = Made({"all": [Candidate(one, other)]}, {}, (other,), 1, 0.0)
    save_pairs(place, made, spec(), WORDS)
    rows = [json.loads(line) for line in read_lines(place)]
    assert [(row["side"], row["prompt"]) for row in rows] == [("target", one), ("contrast", other)]
    assert rows[0]["served_model"] == other
    require_ours(place, spec())


def test_separators_pass_through_a_whole_run(tmp_path, tiny_folder, monkeypatch):
    """In prompts, in what the model answers, and in a thought: measured again, all is there."""
    monkeypatch.chdir(tmp_path)
    prompts = [f"Where\u2028is\u2029the\x85{x}\x0b\x0c\x1cnow?" for x in "abcdefgh"]
    rows = "\n".join(json.dumps({"prompt": p}, ensure_ascii=False) for p in prompts)
    Path("t.jsonl").write_bytes(rows.encode())
    Path("n.txt").write_bytes("\n".join(p.replace("Where", "What") for p in prompts).encode())
    Path("r.yaml").write_text(
        f"model: {tiny_folder('llama')}\nlayers: [2]\nk: 1\nrollouts: {{max_new_tokens: 4}}\n"
        "prompts: {target: {path: t.jsonl}, neutral: {path: n.txt}}\n"
    )
    said = f"<think>{SEPARATORS}</think>Sure!{SEPARATORS}"
    changed = {"response": said, "answer_start": said.index("Sure!")}

    def answering(*arguments, **options):
        answers = evaluation.answer_sets_(*arguments, **options)
        return [a.model_copy(update=changed) for a in answers]

    monkeypatch.setattr(evaluation, "answer_sets_", evaluation.answer_sets, raising=False)
    monkeypatch.setattr(evaluation, "answer_sets", answering)
    for _ in range(2):  # the second reads what the first wrote
        done = CliRunner().invoke(main, ["build", "r.yaml", "--out", "o"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    answers = [json.loads(line) for line in read_lines(Path("o/work/rollouts.jsonl"))]
    asked = {a["prompt"] for a in answers if a["set"] == "target"}
    assert asked < set(prompts)
    assert {a["response"] for a in answers} == {said}
    thoughts = [json.loads(v)["thinking"] for v in read_lines(Path("o/work/verdicts.jsonl"))]
    assert len(thoughts) == len(answers)
    assert all("a\u2028b\u2029c\x85d" in thought for thought in thoughts)
