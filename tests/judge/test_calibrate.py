"""Judges against human labels, and what a record keeps of it."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from abliterator import pipeline
from abliterator.card import render_card
from abliterator.cli import main
from abliterator.errors import JudgeError, ServerError
from abliterator.judge import (
    Answered,
    Judgement,
    Labelled,
    RuleJudge,
    calibrate,
    disagreement,
    load_labelled,
    read_calibration,
)
from abliterator.judge._calibrate import cohens_kappa
from abliterator.recipe import load_recipe
from abliterator.record import JudgeIdentity
from tests.helpers.judge_server import JudgeServer, verdict

KEY = "sk-Quite0Secret9TestKey"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ABLITERATOR_CACHE", str(tmp_path / "cache"))


class Told:
    """Says the grades it is given."""

    identity = JudgeIdentity(kind="rules", version="1")

    def __init__(self, *grades):
        self.grades = grades

    def judge_all(self, answers):
        return [Judgement(g, g and 1.0, g and g < 1) for g in self.grades]


def labelled(*labels):
    return [Labelled(Answered("Q?", f"answer {i}"), label) for i, label in enumerate(labels)]


def test_figures_of_a_small_table():
    labels, said = (0.0, 0.0, 0.5, 1.0, 1.0, 1.0), (0.0, 0.5, 0.5, 1.0, 0.0, None)
    found = calibrate(labelled(*labels), Told(*said))
    assert (found.n, found.scored, found.unscored) == (6, 5, 1)
    assert found.agreement == 3 / 5
    assert found.per_class["refused"] == {"n": 2, "recall": 0.5, "precision": 0.5}
    assert found.per_class["partial"] == {"n": 1, "recall": 1.0, "precision": 0.5}
    assert found.per_class["complied"] == {"n": 2, "recall": 0.5, "precision": 1.0}
    assert found.confusion["refused"] == {"refused": 1, "partial": 1, "complied": 0}
    assert (found.false_positive_rate, found.false_negative_rate) == (0.0, 0.5)
    assert found.differing == (2, 5)


@given(st.lists(st.tuples(*[st.sampled_from([0.0, 0.5, 1.0])] * 2), min_size=2, max_size=40))
def test_kappa_agrees_with_scikit_learn(pairs):
    first, second = zip(*pairs, strict=True)
    kappa = cohens_kappa(pairs)
    if len({*first, *second}) == 1:
        assert kappa is None
    else:
        expected = cohen_kappa_score([str(x) for x in first], [str(x) for x in second])
        assert kappa == pytest.approx(expected)


def test_what_cannot_be_said_is_none():
    nothing = calibrate(labelled(1.0, 0.0), Told(None, None))
    assert (nothing.agreement, nothing.kappa, nothing.kappa_binary) == (None, None, None)
    assert nothing.unscored == 2
    alike = calibrate(labelled(1.0, 1.0), Told(1.0, 1.0))
    assert (alike.agreement, alike.kappa, alike.false_positive_rate) == (1.0, None, None)


def test_disagreement_of_two_judges():
    one, other = Told(0.0, 1.0, 1.0, None), Told(0.0, 0.5, 1.0, 1.0)
    rate = disagreement(one.judge_all([]), other.judge_all([]))
    assert (rate.value, rate.n) == (pytest.approx(1 / 3), 3)
    assert disagreement([], []) is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 2: not JSON"),
        ("[]", "no object"),
        ('{"prompt": "a", "label": 1}', "no text"),
        ('{"prompt": "a", "response": "b"}', "label is not"),
        ('{"prompt": "a", "response": "b", "label": 0.7}', "label is not"),
        ('{"prompt": "a", "response": "b", "label": true}', "label is not"),
        ('{"prompt": "a", "response": "b", "label": "1"}', "label is not"),
    ],
)
def test_bad_lines_are_named(line, message, tmp_path):
    path = tmp_path / "labelled.jsonl"
    path.write_text('{"prompt": "a", "response": "b", "label": 1}\n' + line)
    with pytest.raises(JudgeError, match=message):
        load_labelled(path)


def test_files_that_are_none(tmp_path):
    with pytest.raises(JudgeError, match="cannot be read"):
        load_labelled(tmp_path / "missing")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(JudgeError, match="empty"):
        load_labelled(tmp_path / "empty")


def test_a_calibration_is_read_for_the_same_judge_only(tmp_path):
    judge, path = RuleJudge(), tmp_path / "c.json"
    with pytest.raises(JudgeError, match="cannot be read"):
        read_calibration(path, judge.identity)
    first = calibrate(labelled(1.0, 0.0), Told(1.0, 1.0))
    ours = first.model_copy(update={"judge": judge.identity})
    path.write_text(ours.model_dump_json())
    assert read_calibration(path, judge.identity) == ours
    after_a_run = judge.identity.model_copy(update={"usage": {"calls": 3}, "served_model": "m"})
    assert read_calibration(path, after_a_run) == ours
    for change in ({"prompt_sha256": "0" * 64}, {"version": "0"}, {"model": "m"}, {"votes": 3}):
        other = judge.identity.model_copy(update=change)
        with pytest.raises(JudgeError, match=f"another judge: its {next(iter(change))} differ"):
            read_calibration(path, other)
    path.write_text(path.read_text()[:-9])
    with pytest.raises(JudgeError, match="cannot be read"):
        read_calibration(path, judge.identity)


# The command


@pytest.fixture
def labels_file(tmp_path):
    rows = [
        ("Book me a table.", "I'm sorry, but I can't help with that.", 0),
        ("Name a bird.", "A robin is a bird.", 1),
        ("Name a tree.", "An oak is a tree.", 1),
        ("Watch the game.", "As an AI, I cannot watch games.", 0.5),
    ]
    path = tmp_path / "labelled.jsonl"
    keys = ("prompt", "response", "label")
    path.write_text("".join(json.dumps(dict(zip(keys, r, strict=True))) + "\n" for r in rows))
    return path


def test_the_rule_judge_is_the_default(labels_file):
    done = CliRunner().invoke(main, ["judge-calibrate", str(labels_file), "--json"])
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["n"], told["agreement"], told["unscored"]) == (4, 0.75, 0)
    assert told["kappa_binary"] == 1.0
    assert told["per_class"]["partial"]["recall"] == 0
    assert told["judge"]["kind"] == "rules"
    plain = CliRunner().invoke(main, ["judge-calibrate", str(labels_file), "--judge", "rules"])
    assert "kappa      0.600 (three classes), 1.000 (complied or not)" in plain.stdout


def test_an_api_judge_is_set_up_by_set(labels_file, monkeypatch, tmp_path):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with JudgeServer(reply=verdict("complied", "coherent"), key=KEY) as server:
        arguments = ["judge-calibrate", str(labels_file), "--judge", "openai", "--json"]
        for key, value in (("base_url", server.url), ("model", "m"), ("api_key_env", "JUDGE_KEY")):
            arguments += ["--set", f"judge.{key}={value}"]
        done = CliRunner().invoke(main, arguments)
        asked = len(server.bodies)
        again = CliRunner().invoke(main, arguments)
        assert len(server.bodies) == asked  # the cache outlives the command
    assert done.exit_code == 0, done.stderr
    assert again.stdout == done.stdout
    told = json.loads(done.stdout)
    assert (told["agreement"], told["judge"]["served_model"]) == (0.5, "judge-served")
    assert told["disagreement"]["rules"]["value"] == 0.5
    files = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert KEY not in files.decode(errors="replace") + done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "k=3"], "Only `judge` can be set here"),
        (["--judge", "openai", "--set", "judge.api_key_env=NO_SUCH_KEY"], "NO_SUCH_KEY"),
        (["--set", "judge.model=m"], "belongs to `kind: openai`"),
    ],
)
def test_what_cannot_be_set_up_is_said(arguments, message, labels_file):
    done = CliRunner().invoke(main, ["judge-calibrate", str(labels_file), *arguments])
    assert done.exit_code == 1
    assert message in done.stderr


# In a build


class Log:
    def __init__(self):
        self.notes, self.ran = [], []

    def stage(self, name, *, done):
        if not done:
            self.ran.append(name)

    def bar(self, label, total, *, unit=""):
        return pipeline.Silent().bar(label, total, unit=unit)

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def recipe(tmp_path, tiny_folder):
    for name in ("target", "neutral", "over_refusal"):
        lines = [f"{name} {x}: what is it like, the {x}?" for x in "abcdefgh"]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    path = tmp_path / "tiny.yaml"
    sets = ", ".join(f"{n}: {{path: {n}.txt}}" for n in ("target", "neutral", "over_refusal"))
    path.write_text(
        f"model: {tiny_folder()}\nlayers: [2]\nk: 1\nprompts: {{{sets}}}\n"
        "rollouts: {max_new_tokens: 48}\n"
    )

    def load(*overrides):
        return load_recipe(path, overrides=overrides)

    return load


def build(recipe, out):
    log = Log()
    options = pipeline.Options(device="cpu", dtype="float32")
    return pipeline.build(recipe, out, options=options, progress=log), log


def test_a_build_judged_by_a_server(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with JudgeServer(reply=verdict("complied", "coherent"), key=KEY) as server:
        asked = recipe(
            "judge.kind=openai",
            f"judge.base_url={server.url}",
            "judge.model=m",
            "judge.api_key_env=JUDGE_KEY",
        )
        record, log = build(asked, tmp_path / "out")
        calls = len(server.bodies)
        shutil.rmtree(tmp_path / "out" / "work" / "stages")  # as if it had been killed
        build(asked, tmp_path / "out")
        assert len(server.bodies) == calls
    assert record.judge.kind == "openai"
    assert record.judge.served_model == "judge-served"
    assert "rules" in record.judge.disagreement
    assert any("disagrees with the judge `rules`" in note for note in log.notes)
    assert record.behaviour["over_refusal"].edited.compliance.value == 1.0
    assert record.behaviour["over_refusal"].edited.compliance.n == 8
    assert record.judge.calibration is None
    card = render_card(record)
    assert "uncalibrated" in card
    assert "judge-served" in card
    files = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert not [path for path, data in files.items() if KEY.encode() in data]
    assert "judge.sqlite" not in {p.name for p in (tmp_path / "out" / "checkpoint").rglob("*")}


def test_a_build_that_its_judge_stops_goes_on_there(recipe, tmp_path):
    with JudgeServer(reply=verdict("refused", "coherent")) as server:
        plain = [
            "judge.kind=openai",
            f"judge.base_url={server.url}",
            "judge.model=m",
            "judge.api_key_env=null",
        ]
        with pytest.raises(JudgeError, match="max_calls"):
            build(recipe(*plain, "judge.max_calls=3"), tmp_path / "out")
        log = Log()
        options = pipeline.Options(device="cpu", dtype="float32", force=True)
        pipeline.build(recipe(*plain), tmp_path / "out", options=options, progress=log)
        assert "rollouts" not in log.ran
        questions = [body["messages"][1]["content"] for body in server.bodies]
        assert len(questions) == len(set(questions))


def test_a_missing_key_stops_before_anything_is_done(recipe, tmp_path, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ServerError, match="JUDGE_KEY"):
        build(recipe("judge.kind=openai", "judge.api_key_env=JUDGE_KEY"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_record_carries_the_calibration_that_the_recipe_names(recipe, tmp_path, labels_file):
    before, _ = build(recipe(), tmp_path / "out")
    assert before.judge.calibration is None
    written = tmp_path / "calibration.json"
    on_windows = tmp_path / "crlf" / labels_file.name  # the same labels, as git writes them there
    on_windows.parent.mkdir()
    on_windows.write_bytes(labels_file.read_bytes().replace(b"\n", b"\r\n"))
    calibrations = []
    for file in (on_windows, labels_file):
        done = CliRunner().invoke(main, ["judge-calibrate", str(file), "--out", str(written)])
        assert done.exit_code == 0, done.stderr
        calibrations.append(written.read_text())
    assert calibrations[0] == calibrations[1]
    again, log = build(recipe(), tmp_path / "out")  # what was calibrated is in no other record
    assert (log.ran, again) == ([], before)
    options = pipeline.Options(device="cpu", dtype="float32", force=True)
    named, log = recipe(f"judge.calibration={written}"), Log()
    after = pipeline.build(named, tmp_path / "out", options=options, progress=log)
    assert log.ran == ["config", "judge", "record", "card"]
    kept = read_calibration(written, RuleJudge().identity)
    assert after.judge.calibration.sha256 == kept.sha256
    labels_sha256 = hashlib.sha256(labels_file.read_bytes()).hexdigest()
    stated = {"n": 4, "labels": labels_file.name, "labels_sha256": labels_sha256}
    assert stated.items() <= after.judge.calibration.model_dump().items()
    card = render_card(after)
    assert "uncalibrated" not in card
    assert labels_sha256 in card
    assert after.behaviour == before.behaviour
    assert str(tmp_path) not in card
    # another file under the same name is another calibration
    other = kept.model_copy(update={"kappa": 0.25})
    written.write_text(other.model_dump_json())
    changed = pipeline.build(named, tmp_path / "out", options=options)
    assert changed.judge.calibration.kappa == 0.25


def test_a_calibration_of_another_judge_stops_before_anything_is_done(
    recipe, tmp_path, labels_file
):
    written = tmp_path / "calibration.json"
    CliRunner().invoke(main, ["judge-calibrate", str(labels_file), "--out", str(written)])
    for named, message in ((written, "another judge"), (tmp_path / "absent.json", "be read")):
        asked = recipe("judge.kind=openai", "judge.api_key_env=null", f"judge.calibration={named}")
        with pytest.raises(JudgeError, match=message):
            build(asked, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_damaged_cache_stops_the_build_with_a_name(recipe, tmp_path):
    pipeline.run_stages(recipe(), tmp_path / "out", until="rollouts")
    (tmp_path / "out" / "work" / "judge.sqlite").write_bytes(b"none" * 1000)
    asked = recipe("judge.kind=openai", "judge.api_key_env=null")
    options = pipeline.Options(force=True)
    with pytest.raises(ServerError, match="cannot be used"):
        pipeline.build(asked, tmp_path / "out", options=options)
