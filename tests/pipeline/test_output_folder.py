"""What an output folder may hold, and what the system may refuse."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from abliterator import pipeline
from abliterator.cli import main
from abliterator.errors import FileError, OutputError
from abliterator.pipeline import Options
from abliterator.pipeline._workspace import Workspace
from tests.evaluation.seams import fill_disk_under_logits
from tests.pipeline.builds import FAST, build, write_project


@pytest.fixture
def project(tmp_path, tiny_folder):
    """`project(*overrides)`: a recipe on a copy of a tiny model, tmp_path/base."""
    return write_project(tmp_path, tiny_folder)


@pytest.fixture(scope="module")
def built(tmp_path_factory, tiny_folder):
    """(recipe, OUT) of one build; not to be written to."""
    folder = tmp_path_factory.mktemp("built")
    recipe = write_project(folder, tiny_folder)()
    build(recipe, folder / "out")
    return recipe, folder / "out"


@pytest.mark.parametrize("text", ["", "[]", '{"recipe_digest": 3}', "\x00\xff"])
def test_a_damaged_claim_is_named(built, tmp_path, text):
    recipe, out = built[0], Path(shutil.copytree(built[1], tmp_path / "out"))
    (out / "work" / "abliterator.json").write_text(text, encoding="latin-1")
    with pytest.raises(OutputError, match=r"abliterator\.json is damaged"):
        build(recipe, out)
    _, ran = build(recipe, out, Options(device="cpu", dtype="float32", force=True))
    assert ran == []


@pytest.mark.parametrize("text", ["", '{"artefacts": []}'])
def test_a_damaged_marker_or_cache_costs_only_the_work(built, tmp_path, text):
    recipe, out = built[0], Path(shutil.copytree(built[1], tmp_path / "out"))
    (out / "work" / "stages" / "judge.json").write_text(text)
    (out / "work" / "fingerprint.json").write_text(text)
    _, ran = build(recipe, out)
    assert "judge" in ran


@pytest.mark.parametrize(
    "name", ["work/stages", "work/prompts.json", "work/lock", "checkpoint", "checkpoint/README.md"]
)
@pytest.mark.parametrize("kind", ["file", "folder", "pipe", "link"])
def test_something_else_in_the_place_of_a_file(built, tmp_path, name, kind):
    recipe, out = built[0], Path(shutil.copytree(built[1], tmp_path / "out"))
    place = out / name
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "link":
        place.symlink_to(tmp_path / "nowhere")
    elif kind == "file":
        place.touch()
    else:
        place.mkdir()
    with suppress(OutputError, FileError):  # a name, or it is made anew
        pipeline.run_stages(recipe, out, until="prompts", options=FAST)
        if name.startswith("checkpoint"):
            build(recipe, out)


@pytest.mark.parametrize("out", ["file", "file/out", "/proc/out", "/dev/null/out", "x" * 300])
@pytest.mark.parametrize("command", ["build", "bake"])
def test_an_output_folder_that_cannot_be(project, tmp_path, monkeypatch, out, command):
    project()
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("years of work")
    save_file({"subspace": torch.randn(32, 1)}, "q.safetensors")
    before = sorted(tmp_path.rglob("*"))
    asked = {"build": ["build", "r.yaml"], "bake": ["bake", "--model", "base"]}[command]
    asked += ["--subspace", "q.safetensors"] if command == "bake" else []
    done = CliRunner().invoke(main, [*asked, "--out", out])
    assert done.exit_code == 1, (done.output, done.exception)
    assert isinstance(done.exception, SystemExit), done.exception
    assert Path("file").read_text() == "years of work"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("after", ["rollouts", "judge"])
def test_a_full_disk_is_named_and_the_run_goes_on(project, tmp_path, monkeypatch, after):
    import errno

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill():
        monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(Exception, match=r"no room for|is full") as error:
        build(project(), tmp_path / "out", **{after: fill})
    assert type(error.value).__name__ in {"FileError", "OutputError"}
    monkeypatch.undo()
    _, ran = build(project(), tmp_path / "out")
    assert ran[0] == after


def test_a_full_disk_under_the_bases_logits(project, tmp_path, monkeypatch):
    fill_disk_under_logits(monkeypatch, 1 << 12)
    with pytest.raises(Exception, match=r"no room for .*base_logits\.bin") as error:
        build(project(), tmp_path / "out")
    assert type(error.value).__name__ == "FileError"
    assert not (tmp_path / "out" / "work" / "base_logits.bin").exists()


def test_markers_are_found_by_their_folder(tmp_path):
    """The folder of a run may be moved: paths in markers are relative to it."""
    workspace = Workspace(tmp_path / "a")
    (tmp_path / "a" / "work").mkdir(parents=True)
    file = tmp_path / "a" / "work" / "x.json"
    file.write_text("1")
    workspace.finish("stage", "key", [file], seconds=1, parts={})
    (tmp_path / "a").rename(tmp_path / "b")
    moved = Workspace(tmp_path / "b")
    assert moved.is_done("stage", "key")
    assert moved.artefact("stage", tmp_path / "b" / "work" / "x.json").read_text() == "1"
