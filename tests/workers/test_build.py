"""Builds and comparisons on two workers against one process: the same weights and figures."""

from __future__ import annotations

import json
import shutil

import pytest
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from abliterator import pipeline
from abliterator.cli import main
from abliterator.errors import WorkerError
from abliterator.pipeline import Options
from abliterator.pipeline.stages import bake as bake_stage
from abliterator.recipe import load_recipe
from abliterator.source import resolve_folder

DEMO = "recipes/demo.yaml"
SMALL = [
    "prompts.target.limit=24",
    "prompts.contrast.limit=24",
    "rollouts.limit=12",
    "rollouts.max_new_tokens=8",
    "rollouts.batch_size=5",
    "divergence.limit=12",
    "benchmarks.limit=8",
]
SETS = [part for override in SMALL for part in ("--set", override)]


@pytest.fixture
def demo(request):
    return request.config.rootpath / DEMO


def figures(out) -> dict:
    """What the record says, without times, places and what the machine is."""
    record = json.loads(
        (out / "checkpoint" / "abliterator" / "record.json").read_text(encoding="utf-8")
    )
    return {k: v for k, v in record.items() if k not in {"timing", "provenance", "created"}}


def in_several_files(folder):
    """A copy of the demo's model whose weights are in several files."""
    source = resolve_folder("embedded:demo", revision=None).folder
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    model.save_pretrained(folder, max_shard_size="700KB")
    return folder


@pytest.mark.slow
def test_a_build_on_two_workers(demo, tmp_path, monkeypatch):
    bakes = []
    baked = bake_stage.bake_on_workers
    monkeypatch.setattr(
        bake_stage, "bake_on_workers", lambda *a, **k: bakes.append(1) or baked(*a, **k)
    )
    model = in_several_files(tmp_path / "demo")
    recipe = load_recipe(demo, overrides=[*SMALL, f"model={model}"])
    outs = {workers: tmp_path / str(workers) for workers in (None, 2)}
    for workers, out in outs.items():
        pipeline.build(recipe, out, options=Options(device="cpu", workers=workers))
    assert len(bakes) == 1
    weights = [
        {path.name: path.read_bytes() for path in (out / "checkpoint").glob("*.safetensors")}
        for out in outs.values()
    ]
    assert len(weights[0]) > 3
    assert weights[0] == weights[1]
    local, distributed = map(figures, outs.values())
    assert local == distributed
    compared = [outs[None] / "checkpoint", outs[2] / "checkpoint", "--workers", "2"]
    neutral = demo.parent / "demo" / "neutral.jsonl"
    arguments = [*compared, "--neutral", neutral, "--limit", "3", "--max-new-tokens", "4"]
    result = CliRunner().invoke(main, ["compare", *map(str, arguments), "--device=cpu", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["divergence"]["kl"]["value"] == 0


@pytest.mark.slow
def test_several_recipes_and_one_that_fails(demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = demo.read_text(encoding="utf-8").replace("demo/", f"{demo.parent}/demo/")
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "b.yaml").write_text(text.replace("layers: [4]", "layers: [3]"), encoding="utf-8")
    (tmp_path / "bad.yaml").write_text(text.replace("embedded:demo", "/nowhere"), encoding="utf-8")
    (tmp_path / "worse.yaml").write_text("model: 1\nlayer: 2\n", encoding="utf-8")
    names = ["a.yaml", "bad.yaml", "worse.yaml", "b.yaml"]
    options = ["--device=cpu", "--workers=2", "--json", *SETS, "--set", "benchmarks.tasks=[]"]
    result = CliRunner().invoke(main, ["build", *names, *options])
    assert result.exit_code == 1, result.output
    assert list(json.loads(result.stdout)) == ["a.yaml", "b.yaml"]
    assert "bad.yaml: CheckpointError: /nowhere is not a folder" in result.stderr
    assert "worse.yaml: RecipeError: worse.yaml has" in result.stderr
    for name in ("a", "b"):
        assert (tmp_path / "out" / name / "checkpoint" / "README.md").is_file()
    # one after the other, and everything is there
    result = CliRunner().invoke(main, ["build", *names, "--device=cpu", *options[2:]])
    assert result.exit_code == 1
    assert list(json.loads(result.stdout)) == ["a.yaml", "b.yaml"]


def test_workers_that_cannot_be_are_refused_before_anything_is_written(demo, tmp_path):
    recipe, out = load_recipe(demo), tmp_path / "out"
    with pytest.raises(WorkerError, match="spreads one model over several devices"):
        pipeline.build(recipe, out, options=Options("cpu", max_memory=1 << 30, workers=2))
    with pytest.raises(WorkerError, match="one device of its own"):
        pipeline.build(recipe, out, options=Options("balanced", workers=2))
    assert not out.exists()


def test_folders_of_several_recipes(demo, tmp_path):
    runner = CliRunner()
    result = runner.invoke(main, ["build", str(demo), str(demo), f"--out={tmp_path}"])
    assert result.exit_code == 2
    assert "--out names the folder of one RECIPE" in result.stderr
    result = runner.invoke(main, ["build", str(demo), str(demo)])
    assert result.exit_code == 2
    assert "in the same folder" in result.stderr
