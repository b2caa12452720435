"""A subspace baked without a recipe: the whole checkpoint, or nothing."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from abliterator import pipeline
from abliterator.cli import main
from abliterator.errors import FileError, OutputError
from abliterator.files import partial_of
from abliterator.verification import verify


@pytest.fixture
def base(tmp_path, tiny_folder):
    folder = Path(shutil.copytree(tiny_folder("llama", dtype=torch.bfloat16), tmp_path / "base"))
    save_file(
        {"subspace": torch.linalg.qr(torch.randn(32, 2)).Q.contiguous()}, tmp_path / "q.safetensors"
    )
    return folder


def bake(base: Path, out: Path):
    return pipeline.bake_subspace(str(base), base.parent / "q.safetensors", out)


def names(out: Path) -> set[str]:
    return {path.relative_to(out).as_posix() for path in out.rglob("*")}


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["mlp.down_proj", "self_attn.o_proj"])
def test_a_writer_that_is_not_finite_is_named_and_nothing_is_left(
    base, tmp_path, value, dtype, name
):
    path, tensor = base / "model.safetensors", f"model.layers.2.{name}.weight"
    weights = {n: t.to(dtype) for n, t in load_file(path).items()}
    weights[tensor][3, 5] = value
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(FileError, match=f"{tensor} has numbers that are infinite, NaN"):
        bake(base, tmp_path / "a" / "b" / "out")
    assert not (tmp_path / "a").exists()
    arguments = ["bake", "--model", str(base), "--subspace", str(tmp_path / "q.safetensors")]
    done = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path / "out")])
    assert (done.exit_code, isinstance(done.exception, SystemExit)) == (1, True)
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_that_was_there_stays(base, tmp_path):
    path = base / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] = float("inf")
    save_file(weights, path, metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    with pytest.raises(FileError):
        bake(base, tmp_path / "out")
    assert names(tmp_path / "out") == set()


def test_a_name_as_long_as_names_can_be(base, tmp_path):
    long = "LICENSE" + "x" * 248
    (base / long).write_text("terms")
    bake(base, tmp_path / "out")
    assert (tmp_path / "out" / long).read_text() == "terms"
    assert len(os.fsencode(partial_of(base / long).name)) <= 255
    assert verify(base, tmp_path / "out").ok


def test_what_a_killed_call_left_is_made_anew(base, tmp_path):
    out = tmp_path / "out"
    bake(base, out)
    before = names(out)
    (out / ".partial").mkdir()
    (out / ".partial" / "begun").write_text("half")
    (out / "config.json").unlink()
    bake(base, out)
    assert names(out) == before
    assert verify(base, out).ok


def test_files_that_are_not_ours_are_left(base, tmp_path):
    out = tmp_path / "out"
    (out / ".partial").mkdir(parents=True)
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"thesis\.tex"):
        bake(base, out)
    assert names(out) == {".partial", "thesis.tex"}


def test_two_calls_do_not_share_a_folder(base, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    held = os.open(out, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(OutputError, match="at work"):
        bake(base, out)
    os.close(held)
    bake(base, out)


def test_a_subspace_that_is_no_file(base, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="not a regular file"):
        pipeline.bake_subspace(str(base), tmp_path / "pipe", tmp_path / "out")
    assert not (tmp_path / "out").exists()
