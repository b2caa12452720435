"""A published checkpoint is built again from what lies in it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from abliterator.cli import main
from abliterator.errors import CheckpointError, OutputError
from abliterator.pipeline import compare_rebuilt
from abliterator.source import published_folder
from abliterator.verification import EDITS, RECORD
from tests.helpers.hub_server import HubServer


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_folder) -> tuple[Path, list[str]]:
    """(published checkpoint, --set arguments that say where its local files are)."""
    folder = tmp_path_factory.mktemp("project")
    for name, question in (("target", "Tell me about"), ("neutral", "Name")):
        things = ("river", "bridge", "wall", "market", "square", "port", "gate")
        (folder / f"{name}.txt").write_text("\n".join(f"{question} the {x}." for x in things))
    base = tiny_folder("llama", dtype=torch.bfloat16)
    (folder / "tiny.yaml").write_text(
        f"model: {base}\nlayers: [2]\nk: 1\nrollouts: {{max_new_tokens: 3}}\n"
        "prompts: {target: {path: target.txt}, neutral: {path: neutral.txt}}\n"
    )
    out = folder / "out"
    done = CliRunner().invoke(main, ["build", str(folder / "tiny.yaml"), "--out", str(out)])
    assert done.exit_code == 0, done.output
    places = {"model": base} | {
        f"prompts.{name}.path": folder / f"{name}.txt" for name in ("target", "neutral")
    }
    sets = [word for key, value in places.items() for word in ("--set", f"{key}={value}")]
    return out / "checkpoint", sets


def test_a_published_checkpoint_is_built_again_to_the_last_bit(project, tmp_path):
    published, sets = project
    out = tmp_path / "again"
    done = CliRunner().invoke(main, ["build", "--from", str(published), "--out", str(out), *sets])
    assert done.exit_code == 0, done.output
    last = done.stdout.strip().splitlines()[-1]
    assert last == "6 of 6 edited tensors are the published ones to the last bit"
    weights = "model.safetensors"
    assert (out / "checkpoint" / weights).read_bytes() == (published / weights).read_bytes()


def test_another_strength_is_another_checkpoint_and_the_reason_is_named(project, tmp_path):
    published, sets = project
    out = tmp_path / "other"
    sets = [*sets, "--set", "edit.strength=0.5"]
    done = CliRunner().invoke(main, ["build", "--from", str(published), "--out", str(out), *sets])
    assert done.exit_code == 0, done.output
    assert "0 of 6 edited tensors are the published ones" in done.stdout
    assert "published, rebuilt   recipe digest: " in done.stdout


def test_differences_of_the_circumstances_are_told(project, tmp_path):
    published, _ = project
    other = Path(shutil.copytree(published, tmp_path / "other"))
    assert compare_rebuilt(published, other) == (6, (), ())
    record = json.loads((other / RECORD).read_text())
    lock = record["provenance"]
    assert lock["hardware"]
    assert lock["digests"].keys() == {"moments", "directions"}
    lock |= {"device": "cuda", "packages": {"torch": "0.1"}, "hardware": "H200"}
    lock["digests"]["moments"] = "0" * 64
    lock["prompts"][0]["sha256"] = "0" * 64
    (other / RECORD).write_text(json.dumps(record))
    assert compare_rebuilt(published, other).reasons == ()  # the bits are the same
    edits = json.loads((other / EDITS).read_text())
    edits[0]["sha256_after"] = "0" * 64
    (other / EDITS).write_text(json.dumps(edits[:-1]))
    found = compare_rebuilt(published, other)
    assert (found.same, len(found.different)) == (4, 2)
    assert edits[0]["name"] in found.different
    assert edits[-1]["name"] in found.different
    assert "device: cpu, cuda" in found.reasons
    for what in ("hardware: ", "prompts of target, extraction: ", "sha256 of the moments: "):
        assert any(reason.startswith(what) for reason in found.reasons)
    assert not any("directions" in reason for reason in found.reasons)
    assert any(r.startswith("torch: ") and r.endswith(", 0.1") for r in found.reasons)
    (other / RECORD).write_text("{}")
    with pytest.raises(OutputError, match="how it was built"):
        compare_rebuilt(published, other)


@pytest.mark.parametrize(
    ("field", "told"),
    [
        (("tool", "version"), "abliterator: "),
        (("recipe_digest",), "recipe digest: "),
        (("provenance", "device"), "device: cpu, x"),
        (("provenance", "dtype"), "dtype of computation: "),
        (("provenance", "hardware"), "hardware: "),
        (("provenance", "python"), "python: "),
        (("provenance", "platform"), "platform: "),
        (("provenance", "packages", "transformers"), "transformers: "),
        (("provenance", "digests", "directions"), "sha256 of the directions: "),
        (("model", "files_sha256", "config.json"), "base file config.json: "),
    ],
)
def test_each_thing_that_can_make_other_bits_is_named_alone(project, tmp_path, field, told):
    published, _ = project
    other = Path(shutil.copytree(published, tmp_path / "other"))
    record = json.loads((other / RECORD).read_text())
    here = record
    for part in field[:-1]:
        here = here[part]
    here[field[-1]] = "x"
    (other / RECORD).write_text(json.dumps(record))
    edits = json.loads((other / EDITS).read_text())
    edits[0]["sha256_after"] = "0" * 64
    (other / EDITS).write_text(json.dumps(edits))
    (reason,) = compare_rebuilt(published, other).reasons
    assert reason.startswith(told)
    assert reason.endswith(", x")


def test_from_the_hub_come_the_recipe_and_the_records_but_no_weights(project, tmp_path):
    script = "import sys; from abliterator.source import published_folder as f; print(f('a/b'))"
    with HubServer() as hub:
        hub.commit("model", "a/b", project[0])
        env = {**hub.env(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(
            [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        folder = Path(done.stdout.strip())
        got = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert got == {"recipe.yaml", EDITS, RECORD}
        assert compare_rebuilt(folder, project[0]).different == ()


def test_a_folder_without_a_recipe(tmp_path):
    with pytest.raises(CheckpointError, match=r"no recipe\.yaml"):
        published_folder(str(tmp_path))


@pytest.mark.parametrize("arguments", [[], ["r.yaml", "--from", "x"]])
def test_a_recipe_or_a_published_checkpoint(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("")
    done = CliRunner().invoke(main, ["build", *arguments])
    assert done.exit_code == 2
    assert "--from" in done.stderr
