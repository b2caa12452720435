"""The demo with choices among nodes of a map, and among two positions."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from abliterator import pipeline
from abliterator.capture import load_moments
from abliterator.pipeline import Options
from abliterator.recipe import load_recipe
from abliterator.record import Selection

ROOT = Path(__file__).parents[2]
SMALL = ["selection.prompts=8", "selection.rungs=[]", "selection.controls=1", "selection.scored=8"]


def made(out, until, *settings):
    recipe = load_recipe(ROOT / "recipes" / "demo.yaml", overrides=[*SMALL, *settings])
    pipeline.run_stages(recipe, out, until=until, options=Options(device="cpu", dtype="float32"))
    return out / "work"


@pytest.mark.slow
def test_one_node_is_enough_for_one_direction(tmp_path):
    settings = ("layers=[4]", "k=auto", "directions.stack=som", "directions.grid=[2, 2]")
    work = made(tmp_path / "out", "directions", *settings, "selection.stacks=[1, 2]")
    found = Selection.model_validate_json((work / "sweep.json").read_text())
    assert found.k == 1
    assert sorted(found.nodes) == [0, 1, 2, 3]
    assert set(found.layers) == {4}
    assert found.candidates[0].node == found.nodes[0]
    assert found.candidates[0].answers.compliance.value >= 0.9
    assert [stack.nodes for stack in found.stacks] == [found.nodes[:1], found.nodes[:2]]
    subspace = load_file(work / "directions.safetensors")["subspace"]
    assert subspace.shape == (128, 1)
    assert (tmp_path / "out" / "work" / "plots" / "sweep.png").exists() is False


def test_harmfulness_stands_beside_refusal_where_both_positions_are_captured(tmp_path):
    settings = ("layers=[4]", "k=1", "directions.position=[-1, instruction]")
    work = made(tmp_path / "out", "directions", *settings)
    checks = json.loads((work / "direction_checks.json").read_text())
    moments = load_moments(work / "moments.safetensors")
    at_end, at_text = (
        moments[f"target@{p}"].mean - moments[f"contrast@{p}"].mean for p in (-1, "instruction")
    )
    cosines = torch.cosine_similarity(at_end, at_text)
    assert checks["harmfulness_cosine"] == pytest.approx(cosines.tolist(), abs=1e-6)
    assert cosines.max() < 0.95
    assert checks["protected"] == []
