"""An adapter goes to a repository of its own, and plain PEFT loads it from there."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from abliterator.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from abliterator.cli import main
from abliterator.errors import PublishError
from abliterator.publish import Target, plan_adapter, plan_publish
from abliterator.publish._load_check import check_loads
from abliterator.verification import DIRECTIONS, EDITS, RECORD
from tests.helpers.hub_repos import Fault
from tests.publish.conftest import (
    NAME,
    TOKEN,
    build,
    commits,
    environment,
    files_of,
    on_hub,
    run,
)

LORA = "somebody/tiny-lora"
FILES = {"README.md", ADAPTER_CONFIG, ADAPTER_WEIGHTS, "recipe.yaml", DIRECTIONS, EDITS, RECORD}

LOAD = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
def load(where): return AutoModelForCausalLM.from_pretrained(where, dtype="auto")
base, checkpoint, adapter = sys.argv[1:]
ids = torch.arange(4, 24)[None]
with torch.inference_mode():
    plain, wanted = load(base)(ids).logits, load(checkpoint)(ids).logits
    found = PeftModel.from_pretrained(load(base), adapter)(ids).logits
assert (plain - wanted).abs().max() > 0.1
torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)  # float32
print(float((found - wanted).abs().max()))
"""


def plan(built: tuple[Path, Path], out: Path, **target):
    base, _ = built
    checkpoint = plan_publish(base, out / "checkpoint", Target(NAME, **target))
    return plan_adapter(checkpoint, out / "adapter", Target(LORA, **target))


@pytest.fixture(scope="module", params=["one for all blocks", "one a block"])
def of_either(request, built, tmp_path_factory, tiny_folder):
    """(base, OUT) of an edit with one subspace, or with one for each block."""
    if request.param == "one for all blocks":
        return built
    folder = tmp_path_factory.mktemp("by-block")
    base, out = build(folder, tiny_folder, "directions.stack=per_layer", "layers=[1, 2, 3]")
    edits = json.loads((out / "checkpoint" / EDITS).read_text())
    assert {edit["subspace"] for edit in edits} == {"block"}
    return base, out


@pytest.mark.slow
def test_the_command_publishes_both_and_peft_loads_the_adapter(hub, of_either, tmp_path):
    built, out = of_either, Path(shutil.copytree(of_either[1], tmp_path / "out"))
    env = environment(hub, tmp_path / "home", HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1")
    command = [sys.executable, "-m", "abliterator", "publish", str(out), "--repo-id", NAME]
    done = run([*command, "--adapter-repo-id", LORA, "--json"], env)
    assert done.returncode == 0, done.stderr
    assert [told["repo_id"] for told in json.loads(done.stdout)] == [NAME, LORA]
    assert all(hub.repo("model", name).private for name in (NAME, LORA))
    assert on_hub(hub) == files_of(out / "checkpoint")
    there = on_hub(hub, name=LORA)
    assert set(there) == FILES
    for folder in (out / "checkpoint", out / "adapter"):
        both = there.keys() & files_of(folder).keys() - {"README.md"}
        assert all(there[name] == files_of(folder)[name] for name in both)
    assert there["README.md"] == (out / "adapter" / "README.md").read_bytes()
    loaded = run([sys.executable, "-W", "ignore", "-c", LOAD, str(built[0]), NAME, LORA], env)
    assert loaded.returncode == 0, loaded.stderr
    assert float(loaded.stdout) < 1e-4


def test_it_takes_the_same_safe_way(hub, out, publish):
    told = publish(adapter=True, repo_id=LORA, public=True, gated="auto", tag="v1")
    assert set(told["uploaded"]) == FILES == set(on_hub(hub, name=LORA))
    repo = hub.repo("model", LORA)
    assert repo.settings == [{"gated": "auto"}, {"visibility": "public"}]
    assert commits(hub) == 1
    assert publish(adapter=True, repo_id=LORA, public=True, gated="auto")["uploaded"] == []
    (out / "adapter" / "notes.txt").write_text("private")
    assert publish(adapter=True, repo_id=LORA, public=True, gated="auto")["uploaded"] == []
    assert b"private" not in b"".join(on_hub(hub, name=LORA).values())


def test_what_does_not_arrive_whole_is_not_shown(hub, publish):
    hub.faults.append(Fault(f"POST /api/models/{LORA}/commit/main", "damage"))
    assert "differ by hash" in publish(adapter=True, repo_id=LORA, public=True)["error"]
    assert hub.repo("model", LORA).private
    assert publish(adapter=True, repo_id=LORA, public=True)["public"] is True


def test_never_into_the_repository_of_the_checkpoint(hub, built, out, publish):
    publish()
    error = publish(adapter=True, into_existing=True)["error"]
    assert "another model" in error
    assert commits(hub) == 1
    command = ["publish", str(out), "--repo-id", NAME, "--adapter-repo-id", NAME]
    assert CliRunner().invoke(main, command).exit_code == 2


def test_an_adapter_that_is_not_the_checkpoints_edit(built, out):
    path = out / "adapter" / ADAPTER_WEIGHTS
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] * 1.01}, path, metadata={"format": "pt"})
    with pytest.raises(PublishError, match="does not verify"):
        plan(built, out)


@pytest.mark.parametrize("name", [ADAPTER_CONFIG, ADAPTER_WEIGHTS, "README.md"])
def test_an_adapter_that_is_not_whole(built, out, name):
    (out / "adapter" / name).unlink()
    with pytest.raises(PublishError, match=r"edit\.output: both"):
        plan(built, out)


def test_the_licence_of_the_base_goes_along(built, out, tmp_path):
    base = Path(shutil.copytree(built[0], tmp_path / "base"))
    for folder in (base, out / "checkpoint"):
        (folder / "LICENSE").write_text("Be kind.")
        (folder / "NOTICE.txt").write_text("Ours.")
    paths = {file.path for file in plan((base, out), out).files}
    assert paths == {*FILES, "LICENSE", "NOTICE.txt"}


def test_its_card_names_its_base_and_how_peft_loads_it(out):
    header = yaml.safe_load((out / "adapter" / "README.md").read_text().split("---\n")[1])
    assert header["library_name"] == "peft"
    assert header["license"] == "apache-2.0"
    assert "lora" in header["tags"]
    body = (out / "adapter" / "README.md").read_text()
    assert "PeftModel.from_pretrained(model, adapter)" in body


def test_a_checkpoint_published_alone_says_that_the_adapter_stays(built, out):
    dry = ["publish", str(out), "--dry-run", "--base", str(built[0])]
    done = CliRunner().invoke(main, [*dry, "--repo-id", NAME])
    assert done.exit_code == 0, done.output
    assert "--adapter-repo-id NAME publishes it" in done.stderr
    assert ADAPTER_WEIGHTS not in done.stdout
    alone = CliRunner().invoke(main, [*dry, "--adapter-repo-id", LORA])
    assert alone.exit_code == 0, alone.output
    assert ADAPTER_WEIGHTS in alone.stdout
    assert "model-00001" not in alone.stdout
    assert CliRunner().invoke(main, dry).exit_code == 2
    shutil.rmtree(out / "adapter")
    done = CliRunner().invoke(main, [*dry, "--adapter-repo-id", LORA])
    assert done.exit_code == 1
    assert "edit.output: both" in done.stderr


@pytest.mark.slow
def test_an_adapter_that_does_not_load(built, out):
    sound = plan(built, out)
    check_loads(sound)
    (planned,) = (file for file in sound.files if file.path == ADAPTER_CONFIG)
    config = json.loads(planned.content)
    config["target_modules"] = [name.replace("down", "up") for name in config["target_modules"]]
    other = planned.model_copy(update={"content": json.dumps(config).encode()})
    with pytest.raises(PublishError, match="Plain PEFT"):
        check_loads(replace(sound, files=(*sound.files, other)))


def test_the_command_proves_both(built, out):
    verify = ["verify", str(out), "--base", str(built[0])]
    done = CliRunner().invoke(main, verify)
    assert done.exit_code == 0, done.output
    assert f"{out / 'adapter'}: verified" in done.stdout
    other = [*verify[:1], str(out / "checkpoint"), *verify[2:], "--adapter", str(out / "adapter")]
    told = json.loads(CliRunner().invoke(main, [*other, "--json"]).stdout)
    assert (told["ok"], told["adapter"]["ok"], told["adapter"]["modules"]) == (True, True, 6)
    (out / "adapter" / ADAPTER_CONFIG).write_text("{}")
    done = CliRunner().invoke(main, verify)
    assert done.exit_code == 1
    assert "NOT the edit of the checkpoint" in done.stdout
    (out / "checkpoint" / "config.json").write_text("{}")
    done = CliRunner().invoke(main, verify)
    assert done.exit_code == 1
    assert "not looked at" in done.stdout


def test_the_adapter_of_blocks_is_proven_block_by_block(of_either, tmp_path):
    """Each block's factors span its own subspace; those of another block are found out."""
    base, built_out = of_either
    out = Path(shutil.copytree(built_out, tmp_path / "out"))
    verify = ["verify", str(out), "--base", str(base)]
    done = CliRunner().invoke(main, verify)
    assert done.exit_code == 0, done.output
    path = out / "adapter" / ADAPTER_WEIGHTS
    tensors = load_file(path)
    ranges = [t.flatten() / t.norm() for n, t in tensors.items() if "down_proj.lora_B" in n]
    cosines = [abs(float(a @ b)) for a in ranges[:1] for b in ranges[1:]]
    by_block = json.loads((out / "checkpoint" / EDITS).read_text())[0]["subspace"] == "block"
    assert (max(cosines) < 0.99) == by_block
    swapped = {
        name: tensors[name.replace("layers.0.", "layers.1.")].clone()
        for name in tensors
        if "layers.0." in name
    }
    save_file({**tensors, **swapped}, path, metadata={"format": "pt"})
    done = CliRunner().invoke(main, verify)
    assert done.exit_code == 1
    assert "NOT the edit of the checkpoint" in done.stdout
