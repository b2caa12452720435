"""A model whose refusals need more than one direction."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from abliterator import pipeline
from abliterator.pipeline import Options
from abliterator.recipe import load_recipe

ROOT = Path(__file__).parents[2]
FAST = Options(device="cpu", dtype="float32")


@pytest.mark.slow
def test_several_mechanisms_need_several_directions(tmp_path):
    """Three topics, declined in three wordings, taught one after the other (trained here)."""
    script = ROOT / "scripts" / "demo" / "make_several.py"
    subprocess.run([sys.executable, script, "--out", tmp_path / "several"], check=True)
    recipe = load_recipe(tmp_path / "several" / "several.yaml")
    out = tmp_path / "out"
    pipeline.run_stages(recipe, out, until="selection", options=FAST)
    found = json.loads((out / "work" / "sweep.json").read_text())
    assert found["base"]["answers"]["refusal"]["value"] >= 0.8
    assert found["k"] > 1
    assert found["structure"]["verdict"] == "low-rank subspace"
    (taken,) = (s["answers"] for s in found["stacks"] if s["k"] == found["k"])
    single = [c["answers"] for c in found["candidates"] if c["answers"] and len(c["rungs"]) > 1]
    single.append(found["stacks"][0]["answers"])
    left = min(answers["refusal"]["value"] for answers in single)
    assert left - taken["refusal"]["value"] >= 0.2
    assert taken["coherence"]["value"] >= 0.95
