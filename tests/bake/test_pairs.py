"""An edit W' = W - s U Vᵀ W of each module: baked, previewed, as an adapter, and refused."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from abliterator.bake import (
    bake,
    plan_edits,
    preview_edit,
    preview_edits,
    require_bounded,
    sequential_pairs,
    start_pairs,
    write_adapter,
    write_config,
)
from abliterator.checkpoint import Checkpoint
from abliterator.directions import left_behind, load_directions
from abliterator.errors import DirectionError, RecipeError, UnsupportedModel
from abliterator.model import LoadedModel
from abliterator.recipe import Edit
from abliterator.subspace import random_basis
from tests.helpers.architectures import D_MODEL, VOCABULARY, save
from tests.helpers.pairs import baked_with_pairs, planned, random_pairs

# plain; biased; norms behind the writers; Conv1D; experts: fused, one by one, with biases
NAMES = ("llama", "qwen2", "gemma2", "gpt2", "mixtral", "qwen3_moe", "gpt_oss")


def tokens() -> torch.Tensor:
    return torch.randint(4, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(5))


def vanilla(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(tokens(), use_cache=False).logits


@pytest.fixture(scope="module", params=NAMES)
def folder(request, tmp_path_factory):
    return save(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save("llama", tmp_path_factory.mktemp("llama"), dtype=torch.bfloat16)


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
def test_with_u_and_v_of_a_subspace_the_bytes_are_those_of_its_removal(rounding, llama, tmp_path):
    checkpoint, _, plan = planned(llama, rounding=rounding)
    basis = random_basis(D_MODEL, 2, seed=3)
    pairs = torch.stack([basis, basis]).expand(len({*plan.pair_of.values()}), -1, -1, -1)
    plain = bake(checkpoint, plan, basis, tmp_path / "plain")
    own = bake(checkpoint, plan, pairs, tmp_path / "own")
    name = "model.safetensors"
    assert (tmp_path / "own" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert {(edit.subspace, edit.leak) for edit in own} == {("writer", None)}
    before, after = (load_file(path / name) for path in (llama, tmp_path / "own"))
    for edit, other in zip(own, plain, strict=True):
        old, new = before[edit.name].double(), after[edit.name].double()
        assert edit.change == pytest.approx(float((new - old).norm() / old.norm()), rel=0.01)
        assert other.change is None


def test_what_is_stored_is_the_formula(folder, tmp_path):
    """Of gains after the writer, U Vᵀ knows nothing: it is of what the matrix itself writes."""
    checkpoint, _, plan = planned(folder)
    pairs = random_pairs(plan, checkpoint)
    baked_with_pairs(folder, tmp_path / "out", pairs)
    before, after = (load_file(p / "model.safetensors") for p in (folder, tmp_path / "out"))
    checked = 0
    for edit in plan.edits:
        if edit.info.shape != before[edit.info.name].shape or edit.writer.kind == "bias":
            continue
        take, read = pairs[plan.pair_of[edit.writer.module]]
        weight = before[edit.info.name].double().movedim(edit.writer.axis, -2)
        exact = weight - edit.strength * take @ (read.T @ weight)
        stored = after[edit.info.name].double().movedim(edit.writer.axis, -2)
        torch.testing.assert_close(stored, exact, rtol=1e-6, atol=1e-6)
        checked += 1
    assert checked > 0


def test_compensated_rounding_keeps_what_the_edit_writes(llama, tmp_path):
    """The edit lies in the span of U: there the stored numbers are the exact ones."""
    left = {}
    for rounding in ("nearest", "compensated"):
        checkpoint, _, plan = planned(llama, rounding=rounding)
        pairs = random_pairs(plan, checkpoint, r=1)
        bake(checkpoint, plan, pairs, tmp_path / rounding)
        before, after = (load_file(p / "model.safetensors") for p in (llama, tmp_path / rounding))
        squares = 0.0
        for edit in plan.edits:
            take, read = pairs[plan.pair_of[edit.writer.module]]
            weight = before[edit.info.name].double()
            exact = weight - edit.strength * take @ (read.T @ weight)
            squares += float((take.T @ (after[edit.info.name].double() - exact)).square().sum())
        left[rounding] = squares**0.5
    assert left["compensated"] < left["nearest"] / 20


def test_at_run_time_it_is_the_bake(folder, tmp_path):
    checkpoint, _, plan = planned(folder)
    pairs = random_pairs(plan, checkpoint)
    baked_with_pairs(folder, tmp_path / "out", pairs)
    model, baked = vanilla(folder), logits(vanilla(tmp_path / "out"))
    base = logits(model)
    assert (baked - base).abs().max() > 1e-2
    with load_directions(tmp_path / "out").ablated(model):
        torch.testing.assert_close(logits(model), baked, rtol=1e-5, atol=1e-5)
    with preview_edit(LoadedModel(model, None, folder, "cpu"), plan, pairs):
        torch.testing.assert_close(logits(model), baked, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(model), base)


def test_the_start_is_the_removal_of_the_subspace(folder):
    checkpoint, _, plan = planned(folder)
    basis = random_basis(D_MODEL, 2, seed=3)
    pairs = start_pairs(plan, checkpoint, basis)
    model = vanilla(folder)
    loaded = LoadedModel(model, None, folder, "cpu")
    with preview_edit(loaded, plan, basis):
        plain = logits(model)
    with preview_edit(loaded, plan, pairs):
        torch.testing.assert_close(logits(model), plain, rtol=1e-5, atol=1e-5)


def test_in_sequence_one_bake_is_the_bakes_of_each_direction_in_turn(folder, tmp_path):
    """Through the gains of norms too, where every removal is that of its direction through them."""
    directions = torch.randn(3, D_MODEL, generator=torch.Generator().manual_seed(2)) + 0.5
    checkpoint, anatomy, _ = planned(folder)
    plan = plan_edits(checkpoint, anatomy, Edit())
    pairs, left = sequential_pairs(plan, checkpoint, directions)
    bake(checkpoint, plan, pairs, tmp_path / "once")
    write_config(checkpoint, plan, tmp_path / "once")
    source = folder
    for i, direction in enumerate(directions):
        before = Checkpoint.open(source)
        out = tmp_path / str(i)
        bake(
            before, plan_edits(before, anatomy, Edit()), direction[:, None] / direction.norm(), out
        )
        write_config(before, plan, out)
        source = out
    once, turns = (load_file(p / "model.safetensors") for p in (tmp_path / "once", source))
    base = load_file(folder / "model.safetensors")
    for name, weight in turns.items():
        torch.testing.assert_close(once[name], weight, rtol=1e-4, atol=2e-6)
    assert any(not torch.equal(once[name], base[name]) for name in base)
    assert left[-1] < 1e-12 < 0.1 < left[:-1].min()
    if not any(writer.gains for writer in plan.writers):
        torch.testing.assert_close(left, left_behind(directions))


def test_rows_under_pairs_of_their_own_are_rows_alone(llama):
    checkpoint, _, plan = planned(llama)
    bases = [random_pairs(plan, checkpoint), random_pairs(plan, checkpoint, r=1)]
    model = vanilla(llama)
    loaded = LoadedModel(model, None, llama, "cpu")
    with preview_edits(loaded, plan, bases) as choose:
        choose([0, 1, 0])
        together = logits(model)
    for row, edit in enumerate([0, 1, 0]):
        with preview_edit(loaded, plan, bases[edit]):
            torch.testing.assert_close(together[row], logits(model)[row], rtol=1e-4, atol=1e-4)


# peft 0.21 asks transformers 5.23 for a name that is going
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_merged_into_the_base_the_adapter_is_the_bake(name, tmp_path):
    base = save(name, tmp_path / "base")
    checkpoint, _, plan = planned(base)
    pairs = random_pairs(plan, checkpoint)
    bake(checkpoint, plan, pairs, tmp_path / "baked")
    write_adapter(checkpoint, plan, pairs, tmp_path / "adapter", base_model="me/base")
    merged = PeftModel.from_pretrained(vanilla(base), tmp_path / "adapter").merge_and_unload()
    state = merged.state_dict()
    for key, weight in vanilla(tmp_path / "baked").state_dict().items():
        torch.testing.assert_close(state[key], weight, rtol=1e-5, atol=2e-6)


def test_experts_of_a_block_share_a_pair_and_others_stay(tmp_path):
    base = save("mixtral", tmp_path / "base")
    checkpoint, _, plan = planned(base, experts=(0, 2))
    pairs = random_pairs(plan, checkpoint)
    modules = [edit.writer.module for edit in plan.edits if edit.writer.component == "expert"]
    assert {plan.pair_of[module] for module in modules} < {*range(len(pairs))}
    baked_with_pairs(base, tmp_path / "out", pairs, experts=(0, 2))
    model, baked = vanilla(base), logits(vanilla(tmp_path / "out"))
    with preview_edit(LoadedModel(model, None, base, "cpu"), plan, pairs):
        torch.testing.assert_close(logits(model), baked, rtol=1e-5, atol=1e-5)


# ---- refusals


def test_pairs_of_another_model(llama):
    checkpoint, _, plan = planned(llama)
    pairs = random_pairs(plan, checkpoint)
    for wrong in (pairs[1:], pairs[:, :1]):
        with pytest.raises(UnsupportedModel, match="were made for another model"):
            require_bounded(checkpoint, plan, wrong, 0.5)
    with pytest.raises(UnsupportedModel, match="has 8 dimensions"):
        require_bounded(checkpoint, plan, pairs[:, :, :8], 0.5)
    with pytest.raises(RecipeError, match=r"`edit.norm: column` scales"):
        require_bounded(checkpoint, planned(llama, norm="column")[2], pairs, 0.5)


def test_a_change_beyond_the_bound_is_named_before_anything_is_written(llama):
    checkpoint, _, plan = planned(llama)
    pairs = random_pairs(plan, checkpoint)
    require_bounded(checkpoint, plan, pairs, 0.9)
    with pytest.raises(DirectionError, match=r"change model.* by 0\.\d+ of its .* most 0\.01 was"):
        require_bounded(checkpoint, plan, pairs, 0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_numbers_that_are_not_finite_leave_the_file_as_it_was(dtype, tmp_path):
    base, out = save("llama", tmp_path / "base", dtype=dtype), tmp_path / "out"
    baked_with_pairs(base, out)
    before = (out / "model.safetensors").read_bytes()
    checkpoint, _, plan = planned(base)
    size = 1e6 if dtype == torch.float16 else 1e39  # beyond what these hold
    pairs = random_pairs(plan, checkpoint)
    pairs[:, 0] *= size
    for attempt in (
        lambda: bake(checkpoint, plan, pairs, out),
        lambda: require_bounded(checkpoint, plan, pairs, 0.5),
    ):
        with pytest.raises(DirectionError, match="numbers that are not finite, stored as"):
            attempt()
    assert (out / "model.safetensors").read_bytes() == before
