"""Whatever feeds a record is what its stage left: changed artefacts, recipes and bases are met."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from abliterator import pipeline
from abliterator.errors import OutputError, ServerError
from abliterator.files import FileHashes, sha256_of_file
from abliterator.pipeline import Options, _workspace
from abliterator.pipeline._workspace import Workspace
from abliterator.server import Reply, ReplyCache
from abliterator.verification import verify
from tests.pipeline.builds import build, write_project


@pytest.fixture
def project(tmp_path, tiny_folder):
    """`project(*overrides)`: a recipe on a copy of a tiny model, tmp_path/base."""
    return write_project(tmp_path, tiny_folder)


def change(path: Path) -> None:
    """One byte of a file, with its size and its time of change as before."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


ARTEFACTS = (
    "work/prompts.json",
    "work/moments.safetensors",
    "work/directions.safetensors",
    "work/rollouts.jsonl",
    "work/verdicts.jsonl",
    "work/judge.json",
    "work/divergence.json",
    "work/divergence_paths.json",
    "checkpoint/model.safetensors",
    "checkpoint/config.json",
    "checkpoint/tokenizer.json",
    "checkpoint/abliterator/edits.json",
    "checkpoint/abliterator/directions.safetensors",
    "checkpoint/abliterator/record.json",
    "checkpoint/recipe.yaml",
    "checkpoint/README.md",
)


def stage_of(workspace: Workspace, name: str) -> str:
    """The stage that made an artefact."""
    for stage in pipeline.STAGES:
        marker = workspace.marker(stage.name)
        if marker is not None and name in marker.artefacts:
            return stage.name
    raise AssertionError(name)


@pytest.mark.parametrize("least", [0, 1 << 40], ids=["remembered", "hashed anew"])
def test_every_artefact_that_was_changed_is_noticed(project, tmp_path, monkeypatch, least):
    """One byte, with the size and the time of change as they were."""
    monkeypatch.setattr(_workspace, "_REMEMBERED_FROM", least)
    monkeypatch.setattr(FileHashes, "SETTLED_NS", -1)
    out = tmp_path / "out"
    build(project(), out)
    before = {name: (out / name).read_bytes() for name in ARTEFACTS}
    for name in ARTEFACTS:
        workspace = Workspace(out)
        stage = stage_of(workspace, name)
        key = workspace.marker(stage).key
        assert workspace.is_done(stage, key), name
        change(out / name)
        for seen_by in (workspace, Workspace(out)):
            assert not seen_by.is_done(stage, key), name
            with pytest.raises(OutputError, match="is not as the stage"):
                seen_by.artefact(stage, out / name)
            with pytest.raises(OutputError, match="is not as the stage"):
                seen_by.digest(stage)
        (out / name).write_bytes(before[name])
    change(out / "work" / "verdicts.jsonl")
    change(out / "checkpoint" / "model.safetensors")
    change(out / "checkpoint" / "recipe.yaml")
    _, ran = build(project(), out)
    assert ran == ["bake", "judge", "record", "card"]
    for name in set(ARTEFACTS) - {"checkpoint/abliterator/record.json", "checkpoint/README.md"}:
        assert (out / name).read_bytes() == before[name], name
    assert verify(tmp_path / "base", out / "checkpoint").ok


@pytest.mark.parametrize(
    ("at", "name"),
    [
        ("directions", "work/moments.safetensors"),
        ("rollouts", "checkpoint/model.safetensors"),
        ("rollouts", "checkpoint/config.json"),
        ("judge", "work/rollouts.jsonl"),
        ("record", "checkpoint/model.safetensors"),
        ("card", "checkpoint/abliterator/record.json"),
    ],
)
def test_what_is_changed_while_a_run_is_at_work_stops_it(project, tmp_path, at, name):
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="changed"):
        build(project(), out, **{at: lambda: change(out / name)})
    build(project(), out)
    assert verify(tmp_path / "base", out / "checkpoint").ok


@pytest.mark.parametrize("at", ["directions", "rollouts", "record"])
def test_a_base_that_is_replaced_after_capture(project, tmp_path, at):
    """Directions of one model never meet the weights of another."""
    weights = tmp_path / "base" / "model.safetensors"

    def replace():
        tensors = load_file(weights)
        tensors["model.layers.0.mlp.down_proj.weight"] *= 2
        save_file(tensors, weights, metadata={"format": "pt"})

    with pytest.raises(OutputError, match=r"base model in .* was changed"):
        build(project(), tmp_path / "out", **{at: replace})
    record, ran = build(project(), tmp_path / "out")
    assert {"capture", "bake", "rollouts"} <= set(ran)
    assert verify(tmp_path / "base", tmp_path / "out" / "checkpoint").ok
    assert record.model.files_sha256["model.safetensors"] == sha256_of_file(weights)


def test_the_bases_licence_is_part_of_the_record(project, tmp_path):
    out, readme = tmp_path / "out", tmp_path / "base" / "README.md"
    record, _ = build(project(), out)
    assert record.model.license == "mit"
    readme.write_text("---\nlicense: apache-2.0\n---\n")
    assert "states its licence" in "".join(verify(tmp_path / "base", out / "checkpoint").faults)
    record, ran = build(project(), out)
    assert (record.model.license, ran) == ("apache-2.0", ["record", "card"])
    assert verify(tmp_path / "base", out / "checkpoint").ok


def test_a_prompt_file_that_is_changed_while_it_is_read(project, tmp_path):
    with pytest.raises(OutputError, match="`prompts` depends on was changed"):
        build(project(), tmp_path / "out", prompts=lambda: change(tmp_path / "t.txt"))


def test_the_resolved_recipe_is_not_for_editing(project, tmp_path):
    out = tmp_path / "out"
    build(project(), out)
    path = out / "work" / "recipe.yaml"
    plain = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**plain, "layers": [1]}, sort_keys=False))
    with pytest.raises(OutputError, match="not as abliterator left it"):
        build(project(), out)
    with pytest.raises(OutputError, match="not as abliterator left it"):
        pipeline.recipe_of(out)
    forced = Options(device="cpu", dtype="float32", force=True)
    record, ran = build(project(), out, forced)
    assert (record.edit.layers, ran) == ((2,), [])
    assert yaml.safe_load(path.read_text()) == plain


def test_the_same_recipe_with_its_files_elsewhere(project, tmp_path):
    """A digest knows no folders; what is read is what the recipe names now."""
    out = tmp_path / "out"
    build(project(), out)
    (tmp_path / "base").rename(tmp_path / "moved")
    (tmp_path / "b").mkdir()
    (tmp_path / "moved").rename(tmp_path / "b" / "base")
    (tmp_path / "t.txt").rename(tmp_path / "b" / "t.txt")
    here = [f"model={tmp_path}/b/base", f"prompts.target.path={tmp_path}/b/t.txt"]
    _, ran = build(project(*here), out)
    assert ran == []
    assert pipeline.recipe_of(out).model == str(tmp_path / "b" / "base")
    change(tmp_path / "b" / "t.txt")
    _, ran = build(project(*here), out)
    assert ran[0] == "prompts"


def test_a_card_of_another_version_is_rendered_again(project, tmp_path, monkeypatch):
    from abliterator import card

    build(project(), tmp_path / "out")
    rendered = card.render_card
    monkeypatch.setattr(card, "render_card", lambda record: rendered(record) + "\nNew.\n")
    _, ran = build(project(), tmp_path / "out")
    assert ran == ["card"]


# ---- replies


@pytest.fixture
def cache(tmp_path):
    path = tmp_path / "judge.sqlite"
    with ReplyCache(path, account="a") as made:
        for i in range(300):
            made.put(f"key{i}", Reply("x" * 300), cost=0.5)
    return path


def use(path: Path) -> None:
    with ReplyCache(path, account="a") as made:
        made.totals()
        for i in range(300):
            made.get(f"key{i}")
        made.put("new", Reply("y"), cost=0.0)


@pytest.mark.parametrize("page", range(1, 8))
def test_a_malformed_page_is_named(cache, page):
    data = bytearray(cache.read_bytes())
    data[4096 * page : 4096 * page + 2048] = b"\xff" * 2048
    cache.write_bytes(data)
    with pytest.raises(ServerError, match=r"judge\.sqlite cannot be used"):
        use(cache)


@pytest.mark.parametrize(
    "statement",
    [
        "DROP TABLE replies; CREATE TABLE replies (other)",
        "UPDATE replies SET reply = 'none'",
        "UPDATE replies SET reply = '[]'",
        'UPDATE replies SET reply = \'{"text": "a", "other": 1}\'',
        "UPDATE replies SET cost = 'much'",
    ],
)
def test_rows_that_are_none_are_named(cache, statement):
    with sqlite3.connect(cache) as database:
        database.executescript(statement)
    database.close()
    with pytest.raises(ServerError, match=r"judge\.sqlite cannot be used"):
        use(cache)


def test_a_reply_that_was_changed_is_asked_for_again(cache):
    with sqlite3.connect(cache) as database:
        database.execute("UPDATE replies SET reply = replace(reply, 'xx', 'yy') WHERE key = 'key3'")
        database.execute("UPDATE replies SET cost = 0 WHERE key = 'key4'")
        database.execute("UPDATE replies SET key = 'key1000' WHERE key = 'key5'")
    database.close()
    with ReplyCache(cache) as made:
        assert made.get("key2") == Reply("x" * 300)
        assert [made.get(f"key{i}") for i in (3, 4, 5, 1000)] == [None] * 4


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_cache_that_is_no_file(tmp_path, kind):
    path = tmp_path / "judge.sqlite"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(ServerError, match="cannot be used"):
        ReplyCache(path)
