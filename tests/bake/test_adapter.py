"""The edit as a LoRA: what PEFT merges is the baked checkpoint, and what has no such form stops."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from abliterator import pipeline
from abliterator.anatomy import anatomy_of
from abliterator.bake import (
    bake,
    plan_edits,
    require_adapter_form,
    write_adapter,
    write_adapters,
)
from abliterator.checkpoint import Checkpoint
from abliterator.directions import load_subspace
from abliterator.engines import TransformersEngine
from abliterator.errors import RecipeError, UnsupportedModel
from abliterator.model import load_model, render_chat
from abliterator.pipeline import Options
from abliterator.recipe import Edit, load_recipe
from abliterator.subspace import orthonormal_basis
from tests.helpers.architectures import save
from tests.helpers.tiny import D_MODEL

# peft 0.21 asks transformers 5.23 for a name that is going
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

ROOT = Path(__file__).parents[2]
FAST = Options(device="cpu", dtype="float32")


def random_basis(k: int) -> torch.Tensor:
    return orthonormal_basis(torch.randn(k, D_MODEL, generator=torch.Generator().manual_seed(3)))


def planned(folder: Path, **settings):
    checkpoint = Checkpoint.open(folder)
    plan = plan_edits(checkpoint, anatomy_of(checkpoint.config), Edit(**settings))
    return checkpoint, plan


def vanilla(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def merged(base: Path, adapter: Path) -> torch.nn.Module:
    return PeftModel.from_pretrained(vanilla(base), adapter).merge_and_unload()


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text"])
def test_merged_into_the_base_it_is_the_baked_checkpoint(name, k, tmp_path):
    """Post-norm gains and another strength for every writer included."""
    base = save(name, tmp_path / "base")
    checkpoint, plan = planned(base)
    modules = [edit.writer.module for edit in plan.edits]
    plan = plan.with_strengths({m: 0.5 + 0.1 * i for i, m in enumerate(modules)})
    assert any(edit.writer.gains for edit in plan.edits) == (name != "llama")
    bake(checkpoint, plan, random_basis(k), tmp_path / "baked")
    write_adapter(checkpoint, plan, random_basis(k), tmp_path / "adapter", base_model="me/base")
    found, wanted = merged(base, tmp_path / "adapter"), vanilla(tmp_path / "baked")
    before = vanilla(base).state_dict()
    state = found.state_dict()
    assert state.keys() == before.keys()
    for key, weight in wanted.state_dict().items():
        torch.testing.assert_close(state[key], weight, rtol=1e-5, atol=2e-6)
        edited = key.removesuffix(".weight") in modules
        assert torch.equal(before[key], weight) != edited


def test_adapters_written_together_are_those_written_alone(tiny_folder, tmp_path):
    """As the candidates of a sweep are: one pass over the weights, whatever their ranks."""
    checkpoint, plan = planned(tiny_folder("llama"))
    bases = [random_basis(1), random_basis(3), random_basis(3).flip(1)]
    together = [tmp_path / f"together-{i}" for i in range(3)]
    write_adapters(checkpoint, plan, bases, together, base_model="me/base")
    for i, basis in enumerate(bases):
        alone = write_adapter(checkpoint, plan, basis, tmp_path / f"{i}", base_model="me/base")
        for path in alone:
            assert (together[i] / path.name).read_bytes() == path.read_bytes()
    weights = {(folder / "adapter_model.safetensors").read_bytes() for folder in together}
    assert len(weights) == 3


def test_in_bfloat16_they_differ_by_rounding_alone(tiny_folder, tmp_path):
    """The merge is in float32: what is left is storing the result."""
    base = tiny_folder("llama", dtype=torch.bfloat16)
    checkpoint, plan = planned(base)
    bake(checkpoint, plan, random_basis(3), tmp_path / "baked")
    write_adapter(checkpoint, plan, random_basis(3), tmp_path / "adapter", base_model="me/base")
    state = merged(base, tmp_path / "adapter").state_dict()
    wanted = vanilla(tmp_path / "baked").state_dict()
    for edit in plan.edits:
        apart = (state[edit.writer.name] - wanted[edit.writer.name]).norm()
        assert apart < 2**-8 * wanted[edit.writer.name].norm()  # half a step of bfloat16


def test_its_config_is_that_of_an_exact_lora(tiny_folder, tmp_path):
    checkpoint, plan = planned(tiny_folder("llama", dtype=torch.bfloat16))
    config, _ = write_adapter(
        checkpoint, plan, random_basis(3), tmp_path, base_model="me/base", revision="a" * 40
    )
    found = json.loads(config.read_text())
    assert (found["r"], found["lora_alpha"], found["bias"]) == (3, 3, "none")
    assert (found["peft_type"], found["task_type"]) == ("LORA", "CAUSAL_LM")
    assert (found["base_model_name_or_path"], found["revision"]) == ("me/base", "a" * 40)
    assert found["target_modules"] == sorted(edit.writer.module for edit in plan.edits)


@pytest.mark.parametrize(
    ("name", "settings", "error", "says"),
    [
        ("llama", {"norm": "column"}, RecipeError, "`edit.norm: column` has no low-rank form"),
        ("llama", {"embeddings": True}, RecipeError, "`edit.embeddings`"),
        ("gpt2", {}, UnsupportedModel, r"stored \[in, out\]"),
        ("phi", {}, RecipeError, "`edit.biases: false`"),
        ("mixtral", {}, UnsupportedModel, "belongs to experts"),
        ("mamba", {}, UnsupportedModel, "state space's kernel"),
    ],
)
def test_an_edit_that_has_no_such_form_is_named(name, settings, error, says, tmp_path):
    _, plan = planned(save(name, tmp_path / "base"), **settings)
    with pytest.raises(error, match=says):
        require_adapter_form(plan)


def test_biases_that_stay_are_no_obstacle(tiny_folder):
    require_adapter_form(planned(tiny_folder("llama_biased"), biases=False)[1])


@pytest.fixture
def recipe(tmp_path, tiny_folder):
    for name, question in (("target", "Tell me about"), ("neutral", "Name")):
        things = ("river", "bridge", "wall", "market", "square", "port", "gate")
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{question} the {x}." for x in things))
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"model: {tiny_folder('llama', dtype=torch.bfloat16)}\nlayers: [2]\nk: 1\n"
        "prompts: {target: {path: target.txt}, neutral: {path: neutral.txt}}\n"
        "rollouts: {max_new_tokens: 3}\n"
    )
    return lambda *overrides: load_recipe(path, overrides=overrides)


def test_a_recipe_that_asks_has_one_and_bakes_nothing_again(recipe, tmp_path):
    out = tmp_path / "out"
    plain = pipeline.build(recipe(), out, options=FAST)
    assert not (out / "adapter").exists()
    assert plain.recipe["edit"]["output"] == "checkpoint"
    weights = (out / "checkpoint" / "model.safetensors").stat().st_mtime_ns
    force = Options(device="cpu", dtype="float32", force=True)
    record = pipeline.build(recipe("edit.output=both"), out, options=force)
    assert (out / "checkpoint" / "model.safetensors").stat().st_mtime_ns == weights
    assert record.recipe["edit"]["output"] == "both"
    assert record.timing.keys() - plain.timing.keys() == {"adapter"}
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in (out / "adapter").iterdir()} == names
    assert "library_name: peft" in (out / "adapter" / "README.md").read_text()
    assert str(tmp_path) not in (out / "adapter" / "adapter_config.json").read_text()
    pipeline.build(recipe(), out, options=force)
    assert not (out / "adapter").exists()


def test_a_plan_stops_before_anything_is_written(recipe, tmp_path):
    asked = recipe("edit.output=adapter", "edit.norm=column")
    with pytest.raises(RecipeError, match="low-rank"):
        pipeline.build(asked, tmp_path / "out", options=FAST)
    assert not (tmp_path / "out").exists()


def test_a_subspace_baked_alone_has_no_adapter(tiny_folder, tmp_path):
    edit = Edit(output="both")
    with pytest.raises(RecipeError, match=r"edit\.output"):
        pipeline.bake_subspace(str(tiny_folder()), tmp_path / "s", tmp_path / "out", edit=edit)


def test_the_demo_answers_alike_with_the_adapter(tmp_path):
    """32 prompts, the same greedy text from base + adapter as from the baked checkpoint."""
    out, path = tmp_path / "out", ROOT / "recipes" / "demo.yaml"
    asked = load_recipe(path, overrides=["edit.output=both"])
    pipeline.run_stages(asked, out, until="adapter", options=FAST)
    plan = pipeline.plan_recipe(asked, out)
    assert load_subspace(out / "work" / "directions.safetensors").basis.shape[1] == asked.k
    base = load_model(plan.source.folder, device="cpu", dtype="float32")
    baked = load_model(out / "checkpoint", device="cpu", dtype="float32")
    lines = [
        line
        for name in ("evaluation", "neutral")
        for line in (ROOT / "recipes" / "demo" / f"{name}.jsonl").read_text().splitlines()[:16]
    ]
    ids = [render_chat(base.tokenizer, json.loads(line)["prompt"]) for line in lines]
    engine = TransformersEngine(base)
    settings = {"max_new_tokens": 32, "batch_size": 32, "stop_ids": engine.stop_ids}
    plain = [answer.text for answer in engine.answers(ids, **settings)]
    written = [answer.text for answer in TransformersEngine(baked).answers(ids, **settings)]
    PeftModel.from_pretrained(base.model, out / "adapter").merge_and_unload()  # in place
    adapted = [answer.text for answer in engine.answers(ids, **settings)]
    assert len(ids) == 32
    assert adapted == written
    assert plain != written
