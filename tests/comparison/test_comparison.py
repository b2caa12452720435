"""Weight diffs of edits made on purpose, and whole comparisons of tiny models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from abliterator import pipeline
from abliterator.checkpoint import Checkpoint
from abliterator.cli import main
from abliterator.comparison import CompareSettings, compare, diff_weights, to_markdown
from abliterator.recipe import Edit
from abliterator.record import Comparison
from tests.helpers.judge_server import JudgeServer, verdict
from tests.helpers.tiny import D_MODEL


def copy_of(base: Path, where: Path, change) -> Path:
    """A copy of a checkpoint whose tensors were changed by `change`."""
    shutil.copytree(base, where)
    weights = load_file(where / "model.safetensors")
    change(weights)
    save_file(weights, where / "model.safetensors", metadata={"format": "pt"})
    return where


def diff(base: Path, edited: Path):
    return diff_weights(Checkpoint.open(base), Checkpoint.open(edited))


def baked(base: Path, where: Path, k: int, **edit) -> Path:
    generator = torch.Generator().manual_seed(k)
    directions = torch.randn(D_MODEL, k, generator=generator)
    where.mkdir()
    save_file({"subspace": directions}, where / "q.safetensors")
    out = where / "out"
    pipeline.bake_subspace(str(base), where / "q.safetensors", out, edit=Edit(**edit))
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
def test_our_edit_is_a_directional_edit_of_exactly_our_tensors(
    tiny_folder, tmp_path, dtype, k, rounding
):
    base = tiny_folder("llama", dtype=dtype)
    edited = baked(base, tmp_path / "edit", k, rounding=rounding)
    found = diff(base, edited)
    ours = json.loads((edited / "abliterator" / "edits.json").read_text())
    assert {delta.name for delta in found.deltas} == {edit["name"] for edit in ours}
    assert (found.verdict, found.rank) == ("directional", k)
    assert {(delta.rank, delta.side) for delta in found.deltas} == {(k, "output")}
    assert all(delta.strength == pytest.approx(1, abs=0.02) for delta in found.deltas)
    assert found.identical == found.compared - len(ours)


def test_other_strengths_biases_and_embeddings_are_seen(tiny_folder, tmp_path):
    base = tiny_folder("llama_biased", dtype=torch.bfloat16)
    strength = {"attention": 0.5, "mlp": 1.5}
    edited = baked(base, tmp_path / "edit", 2, strength=strength, embeddings=True)
    found = diff(base, edited)
    assert (found.verdict, found.rank) == ("directional", 2)
    told = {delta.name: delta for delta in found.deltas}
    assert any(name.endswith(".bias") for name in told)
    assert told["model.embed_tokens.weight"].side == "output"
    matrices = {name: delta for name, delta in told.items() if len(delta.shape) == 2}
    for name, delta in matrices.items():
        expected = 0.5 if "o_proj" in name else 1.5 if "down_proj" in name else 1.0
        assert delta.strength == pytest.approx(expected, abs=0.05), name


def test_a_model_and_itself(tiny_folder, tmp_path):
    base = tiny_folder("llama")
    same = copy_of(base, tmp_path / "same", lambda weights: None)
    found = diff(base, same)
    assert (found.verdict, found.rank, found.deltas) == ("identical", None, ())
    assert found.identical == found.compared


def test_one_known_wrong_weight_is_found(tiny_folder, tmp_path):
    name = "model.layers.1.self_attn.q_proj.weight"
    edited = copy_of(
        tiny_folder("llama", dtype=torch.bfloat16),
        tmp_path / "one",
        lambda weights: weights[name][3, 4].add_(1.0),
    )
    found = diff(tiny_folder("llama", dtype=torch.bfloat16), edited)
    assert [(delta.name, delta.rank) for delta in found.deltas] == [(name, 1)]
    assert found.deltas[0].norm == pytest.approx(1, abs=0.02)
    assert found.deltas[0].side is None
    assert found.verdict == "low_rank"


@pytest.mark.parametrize("scale", [0.3, 0.02])
def test_noise_is_no_directional_edit(tiny_folder, tmp_path, scale):
    base = tiny_folder("llama", dtype=torch.bfloat16)

    def noisy(weights):
        for weight in weights.values():
            weight.add_(scale * weight.float().std() * torch.randn(weight.shape).to(weight.dtype))

    found = diff(base, copy_of(base, tmp_path / "noisy", noisy))
    assert (found.verdict, found.rank) == ("full_rank", None)


def test_noise_on_top_of_an_edit_is_no_directional_edit(tiny_folder, tmp_path):
    base = tiny_folder("llama", dtype=torch.bfloat16)
    edited = baked(base, tmp_path / "edit", 1)

    def one_noisy(weights):
        weights["model.layers.2.mlp.up_proj.weight"].add_(
            0.01 * torch.randn(48, D_MODEL).bfloat16()
        )

    found = diff(base, copy_of(edited, tmp_path / "noisy", one_noisy))
    assert found.verdict == "full_rank"


def test_the_wrong_side_is_told_from_the_right_one(tiny_folder, tmp_path):
    """o_proj is square: only what was removed says on which side."""
    base = tiny_folder("llama", dtype=torch.bfloat16)
    direction = torch.nn.functional.normalize(torch.randn(D_MODEL), dim=0)

    def wrong(weights):
        for layer in range(3):
            weight = weights[f"model.layers.{layer}.self_attn.o_proj.weight"]
            exact = weight.float()
            weight.copy_(exact - torch.outer(exact @ direction, direction))

    found = diff(base, copy_of(base, tmp_path / "wrong", wrong))
    assert {(delta.rank, delta.side) for delta in found.deltas} == {(1, "input")}
    assert found.verdict == "low_rank"


def test_a_lora_and_directions_that_differ_are_no_directional_edit(tiny_folder, tmp_path):
    base = tiny_folder("llama", dtype=torch.bfloat16)
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(3)]

    def lora(weights):
        for name in names:
            weights[name].add_((torch.randn(D_MODEL, 2) @ torch.randn(2, 48)).bfloat16())

    def own_directions(weights):
        for name in [*names, "model.layers.2.self_attn.o_proj.weight"]:
            q = torch.nn.functional.normalize(torch.randn(D_MODEL), dim=0)
            exact = weights[name].float()
            weights[name].copy_(exact - torch.outer(q, q @ exact))

    found = diff(base, copy_of(base, tmp_path / "lora", lora))
    assert (found.verdict, {delta.side for delta in found.deltas}) == ("low_rank", {None})
    found = diff(base, copy_of(base, tmp_path / "own", own_directions))
    assert (found.verdict, {delta.side for delta in found.deltas}) == ("low_rank", {"output"})


def test_a_changed_norm_beside_an_edit_is_no_directional_edit(tiny_folder, tmp_path):
    base = tiny_folder("llama", dtype=torch.bfloat16)
    edited = baked(base, tmp_path / "edit", 1)
    found = diff(
        base,
        copy_of(edited, tmp_path / "norm", lambda weights: weights["model.norm.weight"].mul_(2)),
    )
    assert found.verdict == "low_rank"


def test_another_dtype_is_only_rounding(tiny_folder, tmp_path):
    base = tiny_folder("llama", dtype=torch.float32)

    def rounded(weights):
        weights.update({name: weight.bfloat16() for name, weight in weights.items()})

    found = diff(base, copy_of(base, tmp_path / "rounded", rounded))
    assert (found.verdict, found.identical) == ("rounding", 0)


def test_checkpoints_of_other_tensors(tiny_folder):
    found = diff(tiny_folder("llama"), tiny_folder("qwen3"))
    assert found.verdict == "other"
    assert "model.layers.0.self_attn.q_norm.weight" in found.only_edited


def test_shards_do_not_matter(tiny_folder, tmp_path):
    base = tiny_folder("llama", dtype=torch.bfloat16)
    sharded = tiny_folder("llama", dtype=torch.bfloat16, shard_size="30KB")
    edited = baked(sharded, tmp_path / "edit", 2)
    assert (diff(base, edited).verdict, diff(base, edited).rank) == ("directional", 2)
    assert diff(base, sharded).verdict == "identical"


# ---- the whole comparison


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "target.txt").write_text("which river?\nthe old town\n")
    (tmp_path / "neutral.txt").write_text("what is winter?\nthe people there\nname a river\n")
    return tmp_path


def test_a_model_against_itself_differs_in_nothing(tiny_folder, tmp_path):
    folder = tiny_folder("llama")
    settings = CompareSettings(
        prompts={"neutral": ["what is winter?", "the people there"]},
        max_new_tokens=80,
        kl_tokens=4,
    )
    found = compare(folder, folder, settings, scratch=tmp_path)
    assert found.weights.verdict == "identical"
    assert found.divergence.kl.value == found.divergence.kl_first_token.value == 0
    assert found.divergence.top1_agreement.value == 1
    delta = found.behaviour["neutral"].delta
    assert (delta.coherence.value, delta.coherence.n) == (0, 2)
    assert list(tmp_path.iterdir()) == []


def test_the_command(tiny_folder, tmp_path, prompts, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    base = tiny_folder("llama", dtype=torch.bfloat16)
    edited = baked(base, tmp_path / "edit", 2)
    arguments = ["compare", str(base), str(edited), "--device", "cpu", "--max-new-tokens", "80"]
    arguments += ["--target", str(prompts / "target.txt")]
    arguments += ["--neutral", str(prompts / "neutral.txt"), "--json"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    found = Comparison.model_validate_json(result.stdout)
    assert (found.weights.verdict, found.weights.rank) == ("directional", 2)
    assert found.behaviour["target"].delta.compliance.n == 2
    assert found.divergence.kl.n == 3
    assert found.divergence.kl.value > 0
    text = to_markdown(found)
    assert "A directional edit of rank 2" in text
    assert "| KL per token of the first 32, nats |" in text


def test_another_judge_can_be_named(tiny_folder, prompts, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "k")
    folder = str(tiny_folder("llama"))
    arguments = ["compare", folder, folder, "--device", "cpu", "--max-new-tokens", "4", "--json"]
    arguments += ["--target", str(prompts / "target.txt"), "--judge", "openai"]
    with JudgeServer(reply=verdict("complied", "coherent"), key="k") as server:
        for key, value in (("base_url", server.url), ("model", "m"), ("api_key_env", "JUDGE_KEY")):
            arguments += ["--set", f"judge.{key}={value}"]
        result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    found = Comparison.model_validate_json(result.stdout)
    assert (found.judge.kind, found.judge.served_model) == ("openai", "judge-served")
    target = found.behaviour["target"]
    assert (target.base.compliance.value, target.delta.compliance.value) == (1, 0)
    assert target.delta.compliance.n == 2
    assert "(judged by m)" in to_markdown(found)


def test_a_judge_without_its_key_stops_before_a_model_is_loaded(tiny_folder, prompts, monkeypatch):
    monkeypatch.setattr("abliterator.model.load_model", None)
    arguments = ["--target", str(prompts / "target.txt"), "--judge", "openai"]
    arguments += ["--set", "judge.api_key_env=NO_SUCH_KEY"]
    folder = str(tiny_folder("llama"))
    result = CliRunner().invoke(main, ["compare", folder, folder, *arguments])
    assert (result.exit_code, "NO_SUCH_KEY" in result.stderr) == (1, True)


def test_the_command_without_options_needs_no_model(tiny_folder, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("abliterator.model.load_model", fail)
    folder = str(tiny_folder("llama"))
    result = CliRunner().invoke(main, ["compare", folder, folder], catch_exceptions=False)
    assert (result.exit_code, "No tensor differs." in result.stdout) == (0, True)


def test_the_command_names_what_is_wrong(tiny_folder, tmp_path):
    folder = str(tiny_folder("llama"))
    result = CliRunner().invoke(main, ["compare", folder, str(tmp_path / "none")])
    assert result.exit_code == 1
    assert "CheckpointError" in result.stderr


def test_a_hub_task_out_of_reach_stops_before_a_model_is_loaded(tiny_folder, monkeypatch):
    import datasets
    import huggingface_hub

    for place in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(place, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("abliterator.model.load_model", None)
    monkeypatch.setattr("abliterator.comparison._benchmarks.measure_sides", None)
    folder = str(tiny_folder("llama"))
    result = CliRunner().invoke(main, ["compare", folder, folder, "--tasks", "arc_easy"])
    assert result.exit_code == 1
    assert "allenai/ai2_arc" in result.stderr
    assert "HF_HUB_OFFLINE" in result.stderr


@pytest.mark.slow
def test_benchmarks_are_part_of_it(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    base = tiny_folder("llama", dtype=torch.bfloat16)
    edited = baked(base, tmp_path / "edit", 2)
    arguments = ["compare", str(base), str(edited), "--device", "cpu", "--tasks", "demo"]
    result = CliRunner().invoke(
        main, [*arguments, "--task-limit", "6", "--json"], catch_exceptions=False
    )
    found = Comparison.model_validate_json(result.stdout)
    assert {task: r.n for task, r in found.benchmarks.items()} == {
        "everyday_choice": 6, "sums_generation": 6
    }  # fmt: skip
    assert found.benchmarks["everyday_choice"].gold_loglik.n == 6
    assert "| everyday_choice | acc |" in to_markdown(found)
