"""Whole commands under Windows' rules, and with files as its editors and git leave them."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from abliterator import pipeline
from abliterator.cli import main
from abliterator.errors import OutputError
from abliterator.pipeline import Options
from abliterator.recipe import load_recipe
from tests.helpers.windows_rules import windows_rules

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "recipes" / "demo.yaml"
FAST = Options(device="cpu", dtype="float32")
THINGS = ("river", "bridge", "wall", "market", "square", "port", "gate")


@pytest.fixture
def folder(tmp_path, tiny_folder) -> Path:
    """A folder with a model in shards and a recipe; Windows' rules do not hold yet."""
    folder = tmp_path / "p"
    base = shutil.copytree(tiny_folder("llama", shard_size="50KB"), folder / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    for name, question in (("t", "Tell me about"), ("n", "Name")):
        (folder / f"{name}.txt").write_text("\n".join(f"{question} the {x}." for x in THINGS))
    (folder / "r.yaml").write_text(
        f"model: {base}\nlayers: [2]\nk: 1\nedit: {{output: both}}\n"
        "rollouts: {max_new_tokens: 3}\ndivergence: {limit: 2, tokens: 2}\n"
        "prompts: {target: {path: t.txt}, neutral: {path: n.txt}}\n"
    )
    basis = torch.linalg.qr(torch.randn(32, 1)).Q.contiguous()
    save_file({"subspace": basis}, folder / "q.safetensors")
    return folder


@pytest.fixture
def windows(folder, monkeypatch) -> Iterator[Path]:
    """The same folder, under the rules; scratch folders are made in it, and are removed."""
    scratch = folder / "temp"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    with windows_rules(folder):
        yield folder
    assert list(scratch.iterdir()) == []


def run(*arguments: object) -> str:
    done = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return done.stdout


def build(folder: Path, *overrides: str) -> Path:
    recipe = load_recipe(folder / "r.yaml", overrides=overrides)
    pipeline.build(recipe, folder / "out", options=FAST)
    return folder / "out"


def files_of(out: Path) -> dict[str, bytes]:
    """The files that may be published, without those that hold times."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name not in ("README.md", "record.json")
        if (out / "work") not in path.parents
    }


def test_a_build_is_repeated_verified_published_and_compared(windows):
    recipe, out = windows / "r.yaml", windows / "out"
    arguments = ("--out", out, "--device", "cpu", "--dtype", "float32")
    run("build", recipe, *arguments)
    first = files_of(out)
    run("build", out)
    run("build", recipe, *arguments, "--force", "--set", "k=2", "--set", "layers=[2,1]")
    assert files_of(out).keys() == first.keys()
    assert files_of(out) != first
    run("build", recipe, *arguments, "--force")
    assert files_of(out) == first
    run("verify", out)
    assert '"repo_id": "somebody/a"' in run(
        *("publish", out, "--repo-id", "somebody/a", "--dry-run", "--json")
    )
    run(
        *("bake", "--model", windows / "base", "--subspace", windows / "q.safetensors"),
        *("--out", windows / "baked"),
    )
    run("verify", windows / "baked", "--base", windows / "base")
    template = out / "checkpoint" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")  # so that it is compared with the base's too
    prompts = ("--target", windows / "t.txt", "--neutral", windows / "n.txt")
    run("compare", windows / "base", out, *prompts, "--max-new-tokens", "2", "--device", "cpu")


def test_a_sweep(windows):
    """Of the demo, which refuses."""
    settings = ("k=auto", "layers=sweep", "selection.prompts=8", "rollouts.max_new_tokens=8")
    options = [option for setting in settings for option in ("--set", setting)]
    run("sweep", DEMO, "--out", windows / "out", *options, "--device", "cpu")
    assert (windows / "out" / "work" / "sweep.json").is_file()


@pytest.mark.parametrize("command", ["build", "bake"])
def test_an_interrupted_run_goes_on(windows, command):
    """At several of its writes, the last ones included."""

    out = windows / ("out" if command == "build" else "baked")

    def work() -> None:
        if command == "build":
            build(windows)
        else:
            pipeline.bake_subspace(str(windows / "base"), windows / "q.safetensors", out)

    def writes(stop_at: int | None) -> int:
        """How many files `work` writes; it is interrupted at one of them."""
        done, fsync = 0, os.fsync

        def counted(descriptor: int) -> None:
            nonlocal done
            done += 1
            if done == stop_at:
                raise KeyboardInterrupt
            fsync(descriptor)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", counted)
            work()
        return done

    n = writes(None)
    expected = files_of(out)
    assert len(expected) > 5
    for stop_at in {1, n // 2, n - 1}:
        shutil.rmtree(out)
        with pytest.raises(KeyboardInterrupt):
            writes(stop_at)
        work()
        assert files_of(out) == expected


def test_a_run_that_fails_early_removes_its_folder(windows):
    """Its lock is a file that is open, which Windows does not delete."""
    (windows / "n.txt").write_text("\n".join(f"Tell me about the {x}." for x in THINGS))
    with pytest.raises(Exception, match="prompt") as caught:
        build(windows)
    assert not isinstance(caught.value, OutputError)
    assert not (windows / "out").exists()


def test_line_ends_change_nothing_of_a_build(folder):
    """Of recipe, prompts and the base's chat template: as git's core.autocrlf leaves them."""
    (folder / "n.txt").rename(folder / "n.jsonl")
    (folder / "n.jsonl").write_text("".join(f'{{"prompt": "Name the {x}."}}\n' for x in THINGS))
    recipe = folder / "r.yaml"
    recipe.write_text(
        recipe.read_text().replace("n.txt", "n.jsonl")
        + "chat:\n  system: |\n    Be kind.\n    Do.\n"
    )
    out = build(folder)
    first, record = files_of(out), pipeline.read_record(out)
    for name in ("r.yaml", "t.txt", "n.jsonl", "base/chat_template.jinja"):
        text = (folder / name).read_bytes()
        assert text.count(b"\n") > 1
        (folder / name).write_bytes(text.replace(b"\n", b"\r\n"))
    shutil.rmtree(out)
    second, again = files_of(build(folder)), pipeline.read_record(out)
    assert {name for name in first if first[name] != second[name]} == {
        "checkpoint/chat_template.jinja"  # the base's own bytes
    }
    assert again.recipe_digest == record.recipe_digest
    assert again.provenance.prompts == record.provenance.prompts
    assert again.behaviour == record.behaviour
    run("verify", out, "--base", folder / "base")


def test_git_leaves_the_packages_files_as_they_are():
    """Digests of phrases, prompts and demo are part of records."""
    if not (ROOT / ".git").exists():
        pytest.skip("no clone")
    path = "abliterator/judge/phrases.yaml"
    command = ["git", "-c", "core.autocrlf=true", "archive", "--format=tar", "HEAD", path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        file = archive.extractfile(path)
        assert file is not None
        assert b"\r\n" not in file.read()
