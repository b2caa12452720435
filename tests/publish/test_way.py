"""The whole way to a Hub on loopback, through the real huggingface_hub."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path

import pytest

from abliterator.verification import RECORD
from tests.publish.conftest import (
    NAME,
    TOKEN,
    commits,
    edit_record,
    environment,
    files_of,
    on_hub,
    run,
)

LOAD = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
stored = {k: v for path in sys.argv[2:] for k, v in load_file(path).items()}
loaded = model.state_dict()
assert stored.keys() <= loaded.keys()
assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items())
assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
print(len(stored))
"""


@pytest.mark.slow
def test_the_command_publishes_what_plain_transformers_then_loads(hub, built, out, tmp_path):
    env = environment(hub, tmp_path / "home", HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1")
    command = [sys.executable, "-m", "abliterator", "push", str(out), "--repo-id", "tiny", "--json"]
    done = run(command, env)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["repo_id"] == NAME
    assert told["public"] is False
    assert on_hub(hub) == files_of(out / "checkpoint")
    assert set(told["uploaded"]) == set(on_hub(hub))
    assert hub.repo("model", NAME).private
    assert commits(hub) == 1
    assert hub.leaked_tokens == []
    assert load_there(env, out) > 0


def load_there(env: dict[str, str], out: Path) -> int:
    """Tensors that plain transformers, in a fresh process, gets from the Hub, equal to the bit."""
    shards = map(str, (out / "checkpoint").glob("*.safetensors"))
    loaded = run([sys.executable, "-c", LOAD, NAME, *shards], env)
    assert loaded.returncode == 0, loaded.stderr
    return int(loaded.stdout)


def test_a_dry_run_asks_the_hub_nothing(hub, built, out, tmp_path):
    (out / "checkpoint" / "rollouts.jsonl").write_text("private")
    command = [sys.executable, "-m", "abliterator", "publish", str(out), "--repo-id", NAME]
    done = run(
        [*command, "--dry-run", "--public"], environment(hub, tmp_path / "home", HF_TOKEN=TOKEN)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{NAME}: public, gated: as the base is, branch main\n")
    assert "not uploaded, not ours: rollouts.jsonl" in done.stdout
    for name, content in files_of(built[1] / "checkpoint").items():
        assert re.search(rf" {len(content):,}  [0-9a-f]{{12}}  {re.escape(name)}\n", done.stdout)
    assert hub.requests == []


def test_public_comes_last(hub, publish):
    told = publish(public=True)
    assert told["public"] is True
    assert hub.repo("model", NAME).settings == [{"visibility": "public"}]
    order = [path for method, path in hub.requests if method in ("POST", "PUT") or "/tree/" in path]
    at = {
        part: max(i for i, path in enumerate(order) if part in path)
        for part in ("/tree/", "/commit/", "/settings")
    }
    assert at["/commit/"] < at["/tree/"] < at["/settings"]


def test_again_sends_nothing(hub, publish):
    first, second = publish(), publish()
    assert second["uploaded"] == []
    assert set(second["unchanged"]) == set(first["uploaded"])
    assert second["commit"] == first["commit"]
    assert commits(hub) == 1
    third = publish(public=True)
    assert (third["uploaded"], third["public"]) == ([], True)
    assert publish(public=True)["uploaded"] == []  # public already, and nothing to change


def test_only_what_changed_is_sent(hub, out, publish):
    publish()
    edit_record(out, languages=["cy"])
    assert publish()["uploaded"] == ["README.md", RECORD]
    assert on_hub(hub) == files_of(out / "checkpoint")


def test_branch_tag_and_pull_request(hub, out, publish):
    first = publish(revision="v2", tag="v2.0")
    repo = hub.repo("model", NAME)
    assert repo.refs["v2"] == repo.refs["v2.0"] == first["commit"]
    assert on_hub(hub, "main") == {}
    assert on_hub(hub, "v2") == files_of(out / "checkpoint")
    asked = publish(create_pr=True)
    assert repo.refs["refs/pr/1"] == asked["commit"]
    assert asked["url"].endswith("/discussions/1")
    assert on_hub(hub, "main") == {}


def test_a_tag_that_is_taken_is_left(hub, publish):
    publish(tag="v1")
    hub.repo("model", NAME).refs["v1"] = "f" * 40
    assert "has a tag 'v1' already" in publish(tag="v1", public=True)["error"]
    assert hub.repo("model", NAME).private


def test_gated_like_its_base(hub, out, publish):
    hub.commit("model", "maker/base", {"config.json": b"{}"})
    hub.repo("model", "maker/base").gating = "manual"
    edit_record(out, id="maker/base", revision="f" * 40)
    assert publish()["gated"] == "manual"
    order = [path for _, path in hub.requests]
    assert order.index(f"/api/models/{NAME}/settings") < order.index(
        f"/api/models/{NAME}/preupload/main"
    )
    assert publish(gated="no")["gated"] is False
    assert publish(gated="auto")["gated"] == "auto"


@pytest.mark.slow
def test_through_xet_and_back(hub, out, publish, tmp_path):
    """hf_xet's own chunks and store, on this disk: no large file goes any other way."""
    hf_xet = pytest.importorskip("hf_xet")
    hub.xet_store = tmp_path / "xet"
    hub.xet_store.mkdir()
    told = publish(alone={"HF_TOKEN": TOKEN})
    assert set(told["uploaded"]) == set(files_of(out / "checkpoint"))
    assert any(hub.xet_store.rglob("*"))
    assert publish(alone={"HF_TOKEN": TOKEN})["uploaded"] == []
    shards = sorted((out / "checkpoint").glob("*.safetensors"))
    for shard, known in zip(shards, hf_xet.hash_files(list(map(str, shards))), strict=True):
        hub.xet_hashes[hashlib.sha256(shard.read_bytes()).hexdigest()] = known.hash
    assert load_there(environment(hub, tmp_path / "fresh", HF_TOKEN=TOKEN), out) > 0
    asked = [path for _, path in hub.requests]
    assert any("/xet-read-token/" in path for path in asked)
    assert not any(path.startswith(("/lfs/", "/large/")) for path in asked)
