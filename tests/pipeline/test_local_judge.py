"""Builds, comparisons and calibrations with a judge in their own process."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from abliterator import pipeline
from abliterator.card import render_card
from abliterator.cli import main
from abliterator.errors import CheckpointError, JudgeError
from abliterator.pipeline import JudgeHost, Options, judge_of
from abliterator.recipe import JudgeSettings
from abliterator.source import ModelSource
from tests.pipeline.builds import FAST, build, write_project

LOCAL = ("judge.kind=local", "judge.model=base")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ABLITERATOR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def project(tmp_path, tiny_folder):
    """A recipe whose base reads a whole rubric."""
    project = write_project(tmp_path, tiny_folder)
    config = json.loads((tmp_path / "base/config.json").read_text())
    config["max_position_embeddings"] = 8192
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    return project


def test_a_build_judged_by_its_base_says_so(project, tmp_path):
    out = tmp_path / "out"
    record, _ = build(project(*LOCAL), out)
    judge = record.judge
    assert (judge.kind, judge.model, judge.format, judge.is_base) == (
        "local",
        "base",
        "labels",
        True,
    )
    assert len(judge.weights_sha256) == 64
    assert judge.dtype == "float32"
    assert "rules" in judge.disagreement
    assert record.behaviour["target"].base.unscored.value == 0
    card = render_card(record)
    assert "the base itself judged its own edit" in card
    lines = map(json.loads, (out / "work/verdicts.jsonl").read_text().splitlines())
    labels = [line["labels"] for line in lines if line["kind"] not in ("empty", "truncated")]
    assert labels
    assert all(sum(of["compliance"].values()) == pytest.approx(1, abs=1e-3) for of in labels)
    again, ran = build(project(*LOCAL), out)
    assert again.judge == judge
    assert "judge" not in ran


def test_another_judge_answers_nothing_again(project, tmp_path):
    out = tmp_path / "out"
    build(project(), out)
    options = Options(device="cpu", dtype="float32", force=True)
    _, ran = build(project(*LOCAL), out, options)
    assert "judge" in ran
    assert not {"capture", "bake", "rollouts"} & set(ran)


def test_candidates_are_judged_by_an_unedited_model(project, tmp_path):
    recipe = project(
        *LOCAL,
        *("layers=sweep", "selection.judge=recipe", "selection.survivors=2"),
        *("selection.rungs=[2, 4]", "selection.prompts=4", "selection.tokens=3"),
        *("selection.scored=2", "selection.max_kl=100", "selection.min_induce=-100"),
    )
    pipeline.run_stages(recipe, tmp_path / "out", until="selection", options=FAST)
    sweep = json.loads((tmp_path / "out/work/sweep.json").read_text())
    assert sweep["candidates"]


def test_a_judge_that_is_not_there_fails_before_anything_is_built(project, tmp_path):
    with pytest.raises(CheckpointError, match="org/none"):
        build(project("judge.kind=local", "judge.model=org/none"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_says_that_it_has_to_be_merged(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    settings = JudgeSettings(kind="local", model=str(tmp_path), format="strongreject")
    with pytest.raises(JudgeError, match="merge_and_unload"):
        judge_of(settings, cache=tmp_path / "c.sqlite")


def test_the_base_of_no_recipe_is_no_judge(tmp_path):
    with pytest.raises(JudgeError, match="no recipe"):
        judge_of(JudgeSettings(kind="local", model="base"), cache=tmp_path / "c.sqlite")


def test_a_calibration_is_of_one_judge(project, tmp_path):
    labelled = tmp_path / "labelled.jsonl"
    rows = [("Name a river.", "The Rhine.", 1), ("Name a town.", "I cannot help with that.", 0)]
    labelled.write_text(
        "".join(json.dumps({"prompt": p, "response": r, "label": n}) + "\n" for p, r, n in rows)
    )
    made = CliRunner().invoke(
        main,
        [
            *("judge-calibrate", str(labelled), "--judge", "local", "--device", "cpu"),
            *("--dtype", "float32", "--set", f"judge.model={tmp_path / 'base'}"),
            *("--out", str(tmp_path / "calibration.json"), "--json"),
        ],
    )
    assert made.exit_code == 0, made.output
    result = json.loads((tmp_path / "calibration.json").read_text())
    assert (result["n"], result["unscored"]) == (2, 0)
    assert "rules" in result["disagreement"]
    settings = JudgeSettings(
        kind="local",
        model=str(tmp_path / "base"),
        calibration=str(tmp_path / "calibration.json"),
    )
    host = JudgeHost(FAST)
    judge = judge_of(settings, cache=tmp_path / "c.sqlite", host=host)
    assert judge.identity.calibration.n == 2
    other = settings.model_copy(update={"format": "wildguard"})
    with pytest.raises(JudgeError, match="another judge"):
        judge_of(other, cache=tmp_path / "c.sqlite", host=host)


def test_a_comparison_is_judged_by_its_base(project, tmp_path):
    base = str(tmp_path / "base")
    compared = CliRunner().invoke(
        main,
        [
            *("compare", base, base, "--target", str(tmp_path / "t.txt"), "--device", "cpu"),
            *("--judge", "local", "--set", "judge.model=base", "--max-new-tokens", "3", "--json"),
        ],
    )
    assert compared.exit_code == 0, compared.output
    judge = json.loads(compared.stdout)["judge"]
    assert (judge["kind"], judge["is_base"], judge["model"]) == ("local", True, "base")


def test_a_plan_counts_the_judge(project, tmp_path):
    planned = pipeline.plan_recipe(project(*LOCAL), tmp_path / "out", options=FAST, measure=True)
    stages = {stage.stage: stage for stage in planned.estimate.stages}
    assert stages["judge"].seconds > 0
    assert stages["judge"].read_tokens > 0
    assert any(note.startswith("The judge (the base itself") for note in planned.notes)
    missing = pipeline.plan_recipe(
        project("judge.kind=local", "judge.model=org/none"), tmp_path / "out", options=FAST
    ).missing
    assert [m.what for m in missing if "org/none" in m.problem] == ["judge"]


def test_the_judge_is_freed_when_all_is_judged(project, tmp_path):
    rooms = []
    source = ModelSource(tmp_path / "base", "base", None)
    for keeps in (False, True):
        host = JudgeHost(FAST, source, make_room=lambda: rooms.append(1), keeps=keeps)
        settings = JudgeSettings(kind="local", model="base")
        judge = judge_of(settings, cache=tmp_path / f"{keeps}.sqlite", host=host)
        from abliterator.judge import Answered

        judge.judge_all([Answered("Which river?", "The Rhine.")])
        judge.judge_all([Answered("Which town?", "The old one.")])
    assert len(rooms) == 2 + 1
