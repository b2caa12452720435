"""Builds with drawn answers: beside the greedy ones, the same whatever interrupts or batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from abliterator import costs, pipeline
from abliterator.card import render_card
from abliterator.cli import main
from abliterator.costs import ACCELERATORS
from abliterator.pipeline import Options
from abliterator.recipe import load_recipe
from abliterator.record import SampledCompletion
from tests.pipeline.builds import FAST, build, write_project
from tests.pipeline.test_interrupted import Interrupting

DEMO = Path(__file__).parents[2] / "recipes" / "demo.yaml"
DRAWN = ("rollouts.samples=3", "rollouts.temperature=1.2", "rollouts.seed=5")
GREEDY_FILES = ("work/rollouts.jsonl", "work/verdicts.jsonl", "work/divergence.json")


@pytest.fixture
def project(tmp_path, tiny_folder):
    return write_project(tmp_path, tiny_folder)


def samples_in(out):
    lines = (out / "work/samples.jsonl").read_text().splitlines()
    return [SampledCompletion.model_validate_json(line) for line in lines]


def test_drawn_answers_stand_beside_the_greedy_ones(project, tmp_path):
    plain, _ = build(project(), tmp_path / "plain")
    record, _ = build(project(*DRAWN), tmp_path / "out")
    for name in GREEDY_FILES:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert record.behaviour == plain.behaviour
    assert plain.sampled is None
    assert not (tmp_path / "plain/work/samples.jsonl").exists()
    n = plain.behaviour["target"].base.truncated.n
    drawn = record.sampled.behaviour["target"]
    assert (drawn.edited.truncated.n, drawn.clusters) == (3 * n, n)
    assert record.sampled.sampler == {"base": "process", "edited": "process"}
    keys = {(s.set, s.side, s.index, s.sample) for s in samples_in(tmp_path / "out")}
    assert len(keys) == len(samples_in(tmp_path / "out")) == 2 * 3 * (n + n)
    said = "3 answers at temperature 1.2 for each prompt"
    shown = {
        out: CliRunner().invoke(
            main, ["build", str(tmp_path / out), "--details", "--device=cpu", "--dtype=float32"]
        )
        for out in ("out", "plain")
    }
    assert {done.exit_code for done in shown.values()} == {0}
    assert said in render_card(record)
    assert said in shown["out"].stdout
    assert "target truncated, drawn" in shown["out"].stdout
    for text in (shown["plain"].stdout, render_card(plain)):
        assert "answers at temperature" not in text
    pipeline.write_report([tmp_path / "out"])
    assert said in (tmp_path / "out/work/report.html").read_text()


def test_drawn_answers_do_not_depend_on_batches_and_greedy_ones_outlive_them(project, tmp_path):
    """Neither the greedy answers nor a greedy recipe's digest change when answers are drawn too."""
    build(project(), tmp_path / "out")
    progress = Interrupting()
    options = Options(device="cpu", dtype="float32", force=True)
    pipeline.build(project(*DRAWN), tmp_path / "out", options=options, progress=progress)
    labels = {label for label in progress.done if "answers" in label}
    assert labels == {
        f"{side} answers, {name}, drawn {i}"
        for side in ("base", "edited")
        for name in ("target", "neutral")
        for i in (1, 2, 3)
    }
    build(project(*DRAWN, "rollouts.batch_size=1"), tmp_path / "single")
    assert samples_in(tmp_path / "single") == samples_in(tmp_path / "out")
    build(project(*DRAWN[:2], "rollouts.seed=6"), tmp_path / "other")
    assert samples_in(tmp_path / "other") != samples_in(tmp_path / "out")


def test_every_interruption_of_drawing_goes_on_where_it_stopped(project, tmp_path):
    recipe = project(*DRAWN, "rollouts.batch_size=2")

    def run(out, progress):
        pipeline.run_stages(
            recipe, tmp_path / out, until="rollouts", options=FAST, progress=progress
        )
        return [
            (tmp_path / out / "work" / f"{name}.jsonl").read_bytes()
            for name in ("rollouts", "samples")
        ]

    whole = Interrupting()
    expected = run("whole", whole)
    done, interruptions = [], 0
    for _ in range(40):  # each run is interrupted at its third batch
        progress = Interrupting(3, "drawn")
        try:
            files = run("out", progress)
        except KeyboardInterrupt:
            interruptions += 1
            done.append(progress.done)
            continue
        done.append(progress.done)
        break
    assert interruptions > 3
    assert files == expected
    for label, total in whole.total.items():
        if "answers" in label:
            assert sum(counter[label] for counter in done) == total, label


def test_prompts_of_one_form_are_a_cluster(project, tmp_path):
    rows = [{"prompt": f"Tell me about {x}.", "form": x[0]} for x in ("a1", "a2", "a3", "b1", "b2")]
    rows.append({"prompt": "Tell me about it."})
    (tmp_path / "e.jsonl").write_text("\n".join(map(json.dumps, rows)))
    evaluation = (
        f"prompts.evaluation.path={tmp_path / 'e.jsonl'}",
        "prompts.evaluation.cluster=form",
    )
    record, _ = build(project(*evaluation, *DRAWN), tmp_path / "out")
    assert record.behaviour["target"].clusters == 3
    assert record.behaviour["neutral"].clusters is None
    assert record.sampled.behaviour["target"].clusters == 3
    assert record.sampled.behaviour["target"].base.truncated.n == 18
    assert "count 3 clusters of prompts" in render_card(record)


def test_drawn_answers_count_as_often_as_they_are_drawn(tmp_path):
    """Tokens and calls of three drawn answers and a greedy one are four times the greedy one's."""
    rates = costs.assumed(ACCELERATORS["h100"])
    greedy, drawn = (
        pipeline.estimate_on(
            load_recipe(DEMO, overrides=["judge.kind=openai", *more]), tmp_path, rates
        )
        for more in ([], ["rollouts.samples=3"])
    )
    answers, others = (
        next(stage for stage in estimate.stages if stage.stage == "rollouts")
        for estimate in (greedy, drawn)
    )
    assert others.answer_tokens == 4 * answers.answer_tokens
    assert others.seconds > 2 * answers.seconds
    assert drawn.judge.calls == pytest.approx(4 * greedy.judge.calls, abs=4)
