"""A subspace for each block, [L, H, k]: what block i writes loses Q[i], in every room."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from abliterator import pipeline
from abliterator.anatomy import anatomy_of
from abliterator.bake import bake, plan_edits, preview_edit, write_adapter
from abliterator.checkpoint import Checkpoint
from abliterator.cli import main
from abliterator.comparison import diff_weights
from abliterator.directions import load_subspace
from abliterator.errors import AbliteratorError, CheckpointError, RecipeError, UnsupportedModel
from abliterator.model import LoadedModel
from abliterator.recipe import Edit
from abliterator.subspace import orthonormal_basis
from abliterator.verification import verify
from tests.helpers.architectures import D_MODEL, VOCABULARY, save
from tests.helpers.leak import leak_meter

# before the sublayer, after it, experts fused and one by one, Conv1D, experts beside a dense MLP
NAMES = ("llama", "gemma3_text", "qwen3_moe", "mixtral", "gpt2", "gemma4_text-moe")
K = 2


def random_bases(n_layers: int, k: int = K) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.stack(
        [orthonormal_basis(torch.randn(k, D_MODEL, generator=generator)) for _ in range(n_layers)]
    )


def tokens() -> torch.Tensor:
    return torch.randint(4, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(5))


def vanilla(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def planned(folder: Path, **settings):
    checkpoint = Checkpoint.open(folder)
    return checkpoint, plan_edits(checkpoint, anatomy_of(checkpoint.config), Edit(**settings))


@pytest.fixture(scope="module", params=NAMES)
def folder(request, tmp_path_factory):
    return save(request.param, tmp_path_factory.mktemp(request.param))


def leaks_of(model, bases) -> tuple[list[float], list[float]]:
    """What each block writes into its own subspace, and into that of the block after it."""
    each = [leak_meter(model, basis, tokens()) for basis in bases]
    n = len(bases)
    return [each[i][i] for i in range(n)], [each[(i + 1) % n][i] for i in range(n)]


def test_each_block_loses_its_own_subspace_and_no_other(folder, tmp_path):
    checkpoint, plan = planned(folder)
    bases = random_bases(plan.n_layers)
    edits = bake(checkpoint, plan, bases, tmp_path / "out")
    assert {(edit.k, edit.subspace) for edit in edits} == {(K, "block")}
    assert max(edit.leak for edit in edits) < 1e-6
    edited = vanilla(tmp_path / "out")
    own, others = leaks_of(edited, bases)
    assert max(own) < 1e-6
    assert min(others) > 0.01
    assert min(leaks_of(vanilla(folder), bases)[0]) > 0.01

    model = vanilla(folder)
    loaded = LoadedModel(model, None, folder, "cpu")
    with torch.inference_mode():
        wrote = edited(tokens(), use_cache=False).logits
        with preview_edit(loaded, plan, bases):
            previewed = model(tokens(), use_cache=False).logits
        with preview_edit(loaded, plan, bases.flip(0)):
            swapped = model(tokens(), use_cache=False).logits
    torch.testing.assert_close(previewed, wrote, rtol=1e-3, atol=1e-3)
    assert (swapped - wrote).abs().max() > 0.01


def test_the_same_one_for_every_block_is_the_one_for_all(folder, tmp_path):
    checkpoint, plan = planned(folder)
    basis = random_bases(1)[0]
    one = bake(checkpoint, plan, basis, tmp_path / "one")
    each = bake(checkpoint, plan, basis.expand(plan.n_layers, -1, -1), tmp_path / "each")
    assert {edit.subspace for edit in one} == {"all"}
    assert [edit.sha256_after for edit in one] == [edit.sha256_after for edit in each]


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_the_adapter_merges_to_the_baked_weights(name, tmp_path):
    base = save(name, tmp_path / "base")
    checkpoint, plan = planned(base)
    bases = random_bases(plan.n_layers)
    bake(checkpoint, plan, bases, tmp_path / "baked")
    write_adapter(checkpoint, plan, bases, tmp_path / "adapter", base_model="me/base")
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        found = PeftModel.from_pretrained(vanilla(base), tmp_path / "adapter").merge_and_unload()
    state = found.state_dict()
    for key, weight in vanilla(tmp_path / "baked").state_dict().items():
        torch.testing.assert_close(state[key], weight, rtol=1e-5, atol=2e-6)


# ---- from the command line to the proof


@pytest.fixture
def baked(tiny_folder, tmp_path):
    """(base, subspace file, edited checkpoint) by `abliterator bake`, from raw columns."""

    def make(family="llama", **options):
        base, file, out = tiny_folder(family, **options), tmp_path / "q.safetensors", tmp_path / "o"
        save_file({"subspace": torch.randn(3, D_MODEL, K)}, file)
        command = ["bake", "--model", str(base), "--subspace", str(file), "--out", str(out)]
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 0, done.output
        return base, file, out

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verify_measures_each_block_against_its_own(dtype, baked, tmp_path):
    base, file, out = baked(dtype=dtype)
    bases = load_subspace(file).basis
    for i, own in enumerate(bases):
        weight = load_file(out / "model.safetensors")[f"model.layers.{i}.mlp.down_proj.weight"]
        before = load_file(base / "model.safetensors")[f"model.layers.{i}.mlp.down_proj.weight"]
        left = (own.T @ weight.double()).norm() / (own.T @ before.double()).norm()
        assert left < (1e-6 if dtype == torch.float32 else 1e-2)
    command = ["verify", str(out), "--base", str(base), "--json", "--subspace"]
    done = CliRunner().invoke(main, [*command, str(file)])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["max_leak"] < (1e-6 if dtype == torch.float32 else 1e-2)

    save_file({"subspace": load_file(file)["subspace"].flip(0)}, tmp_path / "flipped.safetensors")
    done = CliRunner().invoke(main, [*command, str(tmp_path / "flipped.safetensors")])
    assert done.exit_code == 1
    assert len(json.loads(done.output)["faults"]) == 4  # the block in the middle keeps its own


def test_verify_names_a_subspace_of_another_depth(baked, tmp_path):
    base, _, out = baked()
    save_file({"subspace": torch.randn(4, D_MODEL, K)}, tmp_path / "four.safetensors")
    with pytest.raises(CheckpointError, match=r"each of 4 blocks, and the model has 3"):
        verify(base, out, subspace=tmp_path / "four.safetensors")


@pytest.mark.parametrize("family", ["llama", "llama_biased"])
def test_compare_tells_it_from_one_subspace_and_from_a_lora(family, baked):
    base, _, out = baked(family)
    found = diff_weights(Checkpoint.open(base), Checkpoint.open(out))
    assert (found.verdict, found.rank) == ("directional_by_block", K)


def test_another_depth_or_edited_embeddings_stop_before_anything_is_written(tiny_folder, tmp_path):
    def refused(n_layers: int, error: type[AbliteratorError], says: str, **edit):
        file = tmp_path / "q.safetensors"
        save_file({"subspace": torch.randn(n_layers, D_MODEL, K)}, file)
        with pytest.raises(error, match=says):
            pipeline.bake_subspace(str(tiny_folder()), file, tmp_path / "out", edit=Edit(**edit))
        assert not (tmp_path / "out").exists()

    refused(4, UnsupportedModel, "each of 4 blocks, and the model has 3")
    refused(3, RecipeError, r"embed_tokens.weight, which belongs to no block", embeddings=True)
