"""A build whose model and prompts come from the Hub: pinned once, and the same again without it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.hub_server import HubServer

ROOT = Path(__file__).parents[2]
RECIPE = """
model: somebody/tiny
layers: [2]
k: 1
prompts:
  target: {dataset: somebody/requests, split: "train[:6]"}
  evaluation: {dataset: somebody/requests, split: test}
  neutral: {dataset: somebody/questions}
rollouts: {max_new_tokens: 4}
"""


def lines(texts) -> bytes:
    return "\n".join(json.dumps({"text": text}) for text in texts).encode()


@pytest.mark.slow
def test_a_build_from_the_hub_is_pinned(tiny_folder, tmp_path):
    (tmp_path / "hub.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "abliterator", "build", "hub.yaml", "--out", "o", "--json"]
    with HubServer() as hub:
        requests = {
            "train.jsonl": lines(f"Tell me about the {x} please." for x in "abcdefghij"),
            "test.jsonl": lines(f"Do tell about the {x}." for x in "abc"),
        }
        commits = {
            "model": hub.commit("model", "somebody/tiny", tiny_folder()),
            "target": hub.commit("dataset", "somebody/requests", requests),
            "neutral": hub.commit(
                "dataset",
                "somebody/questions",
                {"train.jsonl": lines(f"What is {x}?" for x in "abcdefgh")},
            ),
        }
        env = hub.env(tmp_path / "home", PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        record = json.loads(done.stdout)
        assert record["model"]["revision"] == commits["model"]
        assert record["model"]["id"] == "somebody/tiny"
        resolved = yaml.safe_load((tmp_path / "o" / "work" / "recipe.yaml").read_text())
        assert resolved["revision"] == commits["model"]
        assert resolved["prompts"]["target"]["revision"] == commits["target"]
        assert resolved["prompts"]["evaluation"]["revision"] == commits["target"]
        assert resolved["prompts"]["neutral"]["revision"] == commits["neutral"]
        # the branches move on; the folder stays with what it was made from
        hub.commit("dataset", "somebody/questions", {"train.jsonl": lines(["Why?", "How?"])})
        again = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
        assert json.loads(again.stdout) == record
