"""The file of pairs, and the command that writes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st

from abliterator.cli import main
from abliterator.errors import OutputError, RecipeError
from abliterator.pairs import WORDS, cache_beside, require_ours, save_pairs
from abliterator.pairs._questions import (
    read_pairs,
)
from abliterator.recipe import load_pairs
from tests.helpers.judge_server import JudgeServer
from tests.pairs.scripted import KEY, ROOT, made, spec, well


def written(tmp_path, server, **more):
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(spec(server, **more).model_dump(mode="json"), sort_keys=False))
    return str(path)


def test_the_command_measures_in_the_tokens_of_a_model(tmp_path, monkeypatch):
    monkeypatch.setenv("PAIRS_KEY", KEY)
    out = tmp_path / "out" / "made.jsonl"
    with JudgeServer(reply=well, key=KEY) as server:
        asked = written(tmp_path, server, tokenizer="embedded:demo", length_gap=40)
        command = ["pairs", asked, "--out", str(out), "--set", "server.api_key_env=PAIRS_KEY"]
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 0, done.output
        first, calls = out.read_text(), len(server.bodies)
        again = CliRunner().invoke(main, [*command, "--json"])
    assert "8 home, 8 garden, 8 road; lengths matched in tokens" in done.stdout
    assert json.loads(again.stdout)["pairs"] == {"home": 8, "garden": 8, "road": 8}
    assert (out.read_text(), len(server.bodies)) == (first, calls)
    rows = [json.loads(line) for line in first.splitlines()]
    assert all(row["tokens"] > 5 and row["tokenizer"] == "embedded:demo" for row in rows)
    texts = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert KEY.encode() not in b"".join(texts) + done.output.encode()


def test_a_file_of_another_origin_is_left_alone(tmp_path):
    path = tmp_path / "pairs.jsonl"
    with JudgeServer(reply=well) as server:
        asked = spec(server)
        save_pairs(path, made(asked, tmp_path), asked, WORDS)
    require_ours(path, asked)
    with pytest.raises(OutputError, match="not made from this spec"):
        require_ours(path, spec("http://elsewhere"))
    for other in (b"", b"my own notes", b"\xff\xfe", b"[]", b'{"prompt": "a"}'):
        path.write_bytes(other)
        with pytest.raises(OutputError):
            require_ours(path, asked)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"categories": {}}, "no category"),
        ({"parameters": {"model": "x"}}, "cannot hold `model`"),
        ({"per_category": 0}, "line .*per_category"),
        ({"near_duplicat": 0.5}, "not a key"),
        ({"server": {"api_key_env": KEY}}, "never a key"),
        ({"server": {"max_usd": 1.0}}, "needs `prices`"),
        ({"server": {"votes": 3}}, "not a key"),
    ],
)
def test_a_spec_that_makes_no_sense(broken, said, tmp_path):
    plain = spec("http://x").model_dump(mode="json")
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({**plain, **broken}))
    with pytest.raises(RecipeError, match=said) as caught:
        load_pairs(tmp_path / "s.yaml")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "pairs").glob("*.yaml")), ids=str)
def test_the_specs_that_we_ship(path):
    asked = load_pairs(path)
    assert asked.server.max_usd is not None
    assert "abliterator pairs" in path.read_text()
    gaps = [abs(WORDS.of(e.target) - WORDS.of(e.contrast)) for e in asked.examples]
    assert max(gaps) <= asked.length_gap
    assert load_pairs(path, overrides=["per_category=3"]).digest != asked.digest


def test_openai_is_not_imported_by_the_room():
    code = "import sys, abliterator.pairs, abliterator.server; print('openai' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", ["p.sqlite", "p.SQLITE", "p.txt", "p", ".jsonl"])
def test_pairs_are_never_written_over_their_own_replies(name, tmp_path):
    (tmp_path / name).write_bytes(b"kept")
    with pytest.raises(OutputError, match=r"\.jsonl"):
        cache_beside(tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"kept"
    assert cache_beside(tmp_path / "p.jsonl") == tmp_path / "p.sqlite"


@given(st.text(st.characters() | st.characters(categories=["Cs"])))
@example("\ud83d\ude00 \ud83d")
def test_half_a_character_in_a_pair_is_mended(text):
    for pair in read_pairs(json.dumps({"target": f"a{text}", "contrast": f"b{text}"})):
        "".join(pair).encode()
