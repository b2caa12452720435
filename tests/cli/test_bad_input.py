"""Bad input, through the command line: one paragraph, exit code 1, nothing written."""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from abliterator.cli import main

RECIPE = """
model: {model}
layers: [2, 1, 3]
k: 2
prompts: {{target: {{path: t.txt}}, neutral: {{path: n.txt}}}}
rollouts: {{max_new_tokens: 4}}
"""


@pytest.fixture
def project(tmp_path, tiny_folder, monkeypatch):
    """A working folder with prompts, a model that may be damaged, and a recipe."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder("llama", dtype=torch.bfloat16, shard_size="30KB"), "sharded")
    shutil.copytree(tiny_folder("llama", dtype=torch.bfloat16), "model")
    Path("t.txt").write_text("\n".join(f"Where is the {x} now?" for x in "abcdefgh"))
    Path("n.txt").write_text("\n".join(f"What is the {x}?" for x in "abcdefgh"))
    Path("r.yaml").write_text(RECIPE.format(model="model"))
    return tmp_path


def refused(says: str, *arguments: str) -> None:
    before = {path for path in Path().rglob("*")}
    done = CliRunner().invoke(main, ["build", "r.yaml", "--out", "out", *arguments])
    assert done.exit_code == 1, (done.exit_code, done.output, done.exception)
    stages = {"prompts", "capture", "directions"}
    paragraph = [line for line in done.stderr.splitlines() if line not in stages]
    assert says in "\n".join(paragraph)
    assert "Traceback" not in done.stderr
    assert "" not in paragraph
    assert {path for path in Path().rglob("*")} == before


@pytest.mark.parametrize("size", ["20", "0GiB", "many", "5 parsecs", "-1GB"])
def test_a_size_without_a_unit_is_bad_usage(project, size):
    done = CliRunner().invoke(main, ["build", "r.yaml", f"--max-memory={size}"])
    assert done.exit_code == 2
    assert "no size with a unit, such as 20GiB" in done.stderr


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("nonsense: 1", "line 7: `nonsense` is not a key of the recipe"),
        ("k: 2", "line 7: `k` is given twice"),
        ("seed: soon", "`seed` must be a valid integer"),
    ],
)
def test_keys_and_types(project, change, says):
    Path("r.yaml").write_text(Path("r.yaml").read_text() + change)
    refused(says)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("layers=[2, 4]", "the model has layers 1 to 3"),
        ("k=4", "k is 4, but only 3 layers are given"),
        ("k=0", "greater than or equal to 1"),
        ("prompts.neutral.path=t.txt", "the same"),
        ("prompts.target.path=absent.txt", "absent.txt"),
        ("model=./absent", "absent"),
        ("benchmarks.tasks=[absent.yaml]", "absent.yaml"),
    ],
)
def test_values(project, value, says):
    refused(says, "--set", value)


def test_an_empty_prompt_file(project):
    Path("t.txt").write_text("\n \n")
    refused("is empty")


def test_only_pickled_weights(project):
    Path("model/model.safetensors").rename("model/pytorch_model.bin")
    refused("pytorch_model.bin")


@pytest.mark.parametrize("keep", [0, 5, 200, 5000, -1])
def test_a_truncated_file(project, keep):
    path = Path("model/model.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    refused("model.safetensors")


def change_index(change) -> None:
    path = Path("sharded/model.safetensors.index.json")
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_an_index_that_names_a_missing_shard(project):
    next(Path("sharded").glob("*-00001-*.safetensors")).unlink()
    refused("-00001-", "--set", "model=sharded")


@pytest.mark.parametrize("path", ["../outside.safetensors", "/etc/passwd", "a/../../b.safetensors"])
def test_an_index_that_leaves_the_folder(project, path):
    change_index(lambda files: files.update({next(iter(files)): path}))
    refused("not a plain path", "--set", "model=sharded")


def test_no_chat_template(project):
    Path("model/chat_template.jinja").unlink()
    refused("no chat template")


def test_a_writer_that_nobody_knows(project):
    weights = load_file("model/model.safetensors")
    weights["model.layers.1.mlp.second_down_proj.weight"] = torch.zeros(32, 48)
    save_file(weights, "model/model.safetensors", metadata={"format": "pt"})
    refused("model.layers.1.mlp.second_down_proj.weight")


def test_dependent_directions(project):
    """A block that writes nothing makes the directions of two layers the same."""
    weights = load_file("model/model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"model.layers.1.{name}.weight"].zero_()
    save_file(weights, "model/model.safetensors", metadata={"format": "pt"})
    refused("layer 1 lies in the span of layer 2")


def test_activations_that_are_nan(project):
    weights = load_file("model/model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, "model/model.safetensors", metadata={"format": "pt"})
    refused("are NaN, computed in float32, and so is the output of model.layers.1.mlp.down_proj")


def test_no_room_on_the_disk(project, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    refused("GB free")


def test_a_folder_that_is_not_ours(project):
    Path("out").mkdir()
    Path("out/thesis.tex").write_text("years of work")
    refused("not made by abliterator")
    refused("not made by abliterator", "--force")


@pytest.mark.slow
def test_a_write_that_fails_half_way_leaves_no_checkpoint(project):
    """A real failure of the system, behind the check of free space: files may not pass 40 kB."""
    save_file({"subspace": torch.randn(32, 1)}, "q.safetensors")
    arguments = ["bake", "--model", "model", "--subspace", "q.safetensors", "--out", "out"]
    done = subprocess.run(
        [sys.executable, "-m", "abliterator", *arguments],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("FileError")
    assert not list(Path("out").rglob("*.safetensors*"))


# ---- what a direction can be taken from


def test_a_position_that_the_template_does_not_have(project):
    refused(
        "The chat template puts 7 tokens after every prompt, so `directions.position` can be -1 to "
        "-7; it is -9.",
        *("--set", "directions.position=-9"),
    )


def test_directions_of_no_length(project):
    """A model that adds nothing: at the template's tokens all prompts are alike."""
    path = Path("model/model.safetensors")
    weights = load_file(path)
    silent = {n: t * 0 if "o_proj" in n or "down_proj" in n else t for n, t in weights.items()}
    save_file(silent, path, metadata={"format": "pt"})
    refused("The direction of layer 2 has length 0.0: nothing separates the two prompt sets there.")


def test_a_base_that_does_not_refuse(project):
    done = CliRunner().invoke(main, ["sweep", "r.yaml", "--out", "out", "--set", "layers=sweep"])
    assert done.exit_code == 1
    assert "The base refuses 0 of 2 held-out target prompts" in done.stderr
    assert "so there is nothing to remove." in done.stderr


def test_prompts_of_the_evaluation_are_not_learned_from(project):
    """They are dropped from extraction, and the record says how many."""
    Path("e.txt").write_text("Where is the a now?\nWhere is the b now?\nWhere is the z now?")
    arguments = ["--set", "prompts.evaluation.path=e.txt"]
    done = CliRunner().invoke(main, ["directions", "r.yaml", "--out", "out", *arguments])
    assert done.exit_code == 0, done.output
    used = json.loads(Path("out/work/prompts.json").read_text())
    assert used["extraction"]["target"]["dropped"] == 2
    assert len(used["extraction"]["target"]["prompts"]) == 6
    assert len(used["evaluation"]["target"]["prompts"]) == 3
