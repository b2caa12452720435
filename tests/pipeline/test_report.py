"""A report on a build, from its folder."""

from __future__ import annotations

import json
import shutil

import pytest
from click.testing import CliRunner

from abliterator import pipeline
from abliterator.checkpoint import Checkpoint
from abliterator.cli import main
from abliterator.comparison import diff_weights, relative_changes
from abliterator.errors import OutputError
from abliterator.verification import read_edits
from tests.pipeline.builds import build, write_project
from tests.report.builds import Page


@pytest.fixture(scope="module")
def built(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("report")
    recipe = write_project(folder, tiny_folder)()
    out = folder / "out"
    build(recipe, out)
    return out


@pytest.fixture
def out(built, tmp_path):
    return shutil.copytree(built, tmp_path / "out", symlinks=True)


def shown(path):
    return json.loads(Page(path.read_text("utf-8")).data)["builds"]


def test_the_report_of_a_build(out):
    done = CliRunner().invoke(main, ["report", str(out)])
    assert done.exit_code == 0, done.output
    path = out / "work" / "report.html"
    assert done.stdout.strip() == str(path)
    (build_shown,) = shown(path)
    record = (out / "checkpoint" / "abliterator" / "record.json").read_text("utf-8")
    assert build_shown["record"] == record
    assert {name: len(rows) for name, rows in build_shown["answers"].items()} == {
        "target": 2,
        "neutral": 2,
    }
    assert all(0 < tensor["change"] < 1 for tensor in build_shown["tensors"])
    n_layers = json.loads(record)["model"]["n_layers"]
    assert [round(row[i], 3) for i, row in enumerate(build_shown["cosines"])] == [1.0] * n_layers


def test_sizes_of_changes_are_those_of_a_comparison(out, built):
    (build_shown,) = shown(pipeline.write_report([out]))
    base, edited = Checkpoint.open(built.parent / "base"), Checkpoint.open(out / "checkpoint")
    deltas = {delta.name: delta.relative for delta in diff_weights(base, edited).deltas}
    assert {t["name"]: t["change"] for t in build_shown["tensors"]} == pytest.approx(deltas)


def test_another_base_than_the_edited_one_gives_no_sizes(out):
    tensors = tuple(read_edits(out / "checkpoint"))
    edited = Checkpoint.open(out / "checkpoint")
    assert {size for _, size in relative_changes(edited, edited, tensors)} == {None}


def test_several_builds(out, built):
    path = pipeline.write_report([out, built], out.parent / "both.html")
    assert [build["name"] for build in shown(path)] == [out.as_posix(), built.as_posix()]


def test_a_report_is_no_part_of_the_checkpoint(out):
    pipeline.write_report([out])
    for place in ("checkpoint", "checkpoint/abliterator", "adapter"):
        with pytest.raises(OutputError, match="may be published"):
            pipeline.write_report([out], out / place / "report.html")


def test_a_file_that_was_changed_is_not_shown(out):
    answers = out / "work" / "rollouts.jsonl"
    answers.write_text(answers.read_text("utf-8").replace("target", "other"), "utf-8")
    with pytest.raises(OutputError, match="not as the stage `rollouts` left it"):
        pipeline.write_report([out])
    assert not (out / "work" / "report.html").exists()


def test_a_folder_without_a_finished_build(out, tmp_path):
    (out / "checkpoint" / "abliterator" / "record.json").unlink()
    with pytest.raises(OutputError, match="`abliterator build` makes it"):
        pipeline.write_report([out])
    with pytest.raises(OutputError, match="not a folder that `abliterator build` made"):
        pipeline.write_report([tmp_path])


def test_a_base_that_is_not_there_leaves_sizes_of_changes_out(out, monkeypatch):
    monkeypatch.setattr("abliterator.pipeline._report.folder_on_disk", lambda *a, **k: None)
    (build_shown,) = shown(pipeline.write_report([out]))
    assert {tensor["change"] for tensor in build_shown["tensors"]} == {None}
