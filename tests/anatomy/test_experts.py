"""Some routed experts edited and others not: the recipe's form, bytes, preview, and proof."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from abliterator import pipeline
from abliterator.anatomy import anatomy_of
from abliterator.bake import bake, plan_edits, preview_edit
from abliterator.card import render_card
from abliterator.checkpoint import Checkpoint
from abliterator.cli import main
from abliterator.errors import RecipeError, UnsupportedModel
from abliterator.model import LoadedModel
from abliterator.pipeline import Options
from abliterator.recipe import Edit, load_edit, load_recipe
from abliterator.record import RunRecord
from abliterator.subspace import orthonormal_basis
from abliterator.verification import EDITS, verify
from tests.card.records import demo_record
from tests.helpers import architectures, tiny
from tests.helpers.architectures import D_MODEL, VOCABULARY, save
from tests.pipeline.test_pipeline import NEUTRAL, TARGET

CHOSEN = (0, 2)  # of 4
# one by one on disk; fused [expert, out, in]; [expert, in, out]; with biases, fused and square;
# a gain behind the experts; dense blocks and shared experts beside them; held by another module
LAYOUTS = [
    ("mixtral", {}),
    ("mixtral-square", {"save_original_format": False}),
    ("qwen3_moe", {}),
    ("aria_text", {}),
    ("gpt_oss-square", {}),
    ("gemma4_text-moe", {}),
    ("deepseek_v3", {}),
    ("granitemoe", {}),
    ("granitemoehybrid", {"save_original_format": False}),
]


def random_basis(k: int = 3) -> torch.Tensor:
    drawn = torch.randn(k, D_MODEL, generator=torch.Generator().manual_seed(3))
    return orthonormal_basis(drawn).contiguous()


def planned(folder: Path, **settings):
    checkpoint = Checkpoint.open(folder)
    return checkpoint, plan_edits(checkpoint, anatomy_of(checkpoint.config), Edit(**settings))


def logits(model) -> torch.Tensor:
    tokens = torch.randint(4, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        return model(tokens, use_cache=False).logits


def vanilla(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: layout[0])
def folder(request, tmp_path_factory):
    name, options = request.param
    return save(name, tmp_path_factory.mktemp(name), **options)


def experts_of(writer, tensor: torch.Tensor) -> dict[int, torch.Tensor]:
    """Each expert's part of a stored tensor."""
    return {writer.expert: tensor} if writer.expert is not None else dict(enumerate(tensor))


def test_the_chosen_experts_are_edited_and_no_other_byte(folder, tmp_path):
    checkpoint, plan = planned(folder, experts=CHOSEN, strength={"expert": 1.0})
    _, everything = planned(folder)
    bake(checkpoint, plan, random_basis(), tmp_path / "some")
    edits = bake(checkpoint, everything, random_basis(), tmp_path / "all")
    before, some, whole = (
        load_file(where / "model.safetensors")
        for where in (folder, tmp_path / "some", tmp_path / "all")
    )
    changed = {name for name in before if not before[name].equal(some[name])}
    routed = [w for w in plan.writers if w.component == "expert"]
    assert changed <= {writer.name for writer in routed}
    for writer in routed:
        sides = [experts_of(writer, side[writer.name]) for side in (before, some, whole)]
        for expert, was in sides[0].items():
            wanted = sides[2] if expert in CHOSEN else sides[0]
            assert sides[1][expert].equal(wanted[expert]), (writer.name, expert)
            assert not was.equal(sides[2][expert])
    assert all(edit.leak is None or edit.leak < 1e-6 for edit in edits)


def test_preview_and_baked_weights_agree(folder, tmp_path):
    checkpoint, plan = planned(folder, experts={1: CHOSEN, 2: "all"})
    bake(checkpoint, plan, random_basis(), tmp_path / "out")
    baked, model = logits(vanilla(tmp_path / "out")), vanilla(folder)
    loaded = LoadedModel(model, None, folder, "cpu")
    with preview_edit(loaded, plan, random_basis()):
        previewed = logits(model)
    torch.testing.assert_close(previewed, baked, rtol=1e-3, atol=1e-3)
    _, everything = planned(folder)
    with preview_edit(loaded, everything, random_basis()):
        assert (logits(model) - baked).abs().max() > 0.01
    assert (logits(model) - baked).abs().max() > 0.01


def test_a_model_that_is_not_told_which_experts_run_is_baked_but_not_previewed(tmp_path):
    folder = save("llama4_text", tmp_path / "base")
    checkpoint, plan = planned(folder, experts=CHOSEN)
    loaded = LoadedModel(vanilla(folder), None, folder, "cpu")
    with (
        pytest.raises(RecipeError, match=r"no run-time form here: model.layers.\d.feed_forward"),
        preview_edit(loaded, plan, random_basis()),
    ):
        pass
    assert bake(checkpoint, plan, random_basis(), tmp_path / "out")


# ---- what is asked for


def test_what_is_not_there_is_an_error_that_says_what_is(tiny_folder, tmp_path):
    mixture = save("deepseek_v3", tmp_path / "base")  # block 0 is dense
    for asked, says in [
        ((1, 4), r"expert 4 of block 1, which has 4: 0 to 3"),
        ({2: (9,)}, r"expert 9 of block 2, which has 4"),
        ({0: (1,)}, r"block 0, which has no routed experts; blocks 1-2 have"),
    ]:
        with pytest.raises(RecipeError, match=says):
            planned(mixture, experts=asked)
    with pytest.raises(RecipeError, match=r"`edit.strength` leaves them alone"):
        planned(mixture, experts=(1,), strength={"attention": 1.0})
    with pytest.raises(RecipeError, match=r"the model has none"):
        planned(tiny_folder(), experts=(0,))
    with pytest.raises(UnsupportedModel, match=r"w2: all experts of a block are one matrix"):
        planned(save("dbrx", tmp_path / "dbrx"), experts=(0,))


def test_experts_of_blocks_that_the_model_does_not_have(tmp_path):
    base = str(save("mixtral", tmp_path / "base"))
    save_file({"subspace": random_basis()}, tmp_path / "q.safetensors")
    edit = load_edit(("edit.experts={1-3: [0]}",))
    with pytest.raises(RecipeError, match=r"`edit.experts.1-3` names block 3, .* blocks 0 to 2"):
        pipeline.bake_subspace(base, tmp_path / "q.safetensors", tmp_path / "out", edit=edit)
    assert not (tmp_path / "out").exists()


# ---- from the command line to the proof


@pytest.fixture(params=[False, True], ids=["fused", "one by one"])
def baked(request, tmp_path):
    """(base, subspace, checkpoint): experts 0 and 2 of block 1, all of block 2, and attention."""
    base = save("mixtral", tmp_path / "base", save_original_format=request.param)
    file, out = tmp_path / "q.safetensors", tmp_path / "out"
    save_file({"subspace": random_basis()}, file)
    command = ["bake", "--model", str(base), "--subspace", str(file), "--out", str(out)]
    done = CliRunner().invoke(main, [*command, "--set", "edit.experts={1: [2, 0], 2: all}"])
    assert done.exit_code == 0, done.output
    return base, file, out


def test_edits_and_proof_name_the_experts(baked):
    base, file, out = baked
    edits = {edit["name"]: edit for edit in json.loads((out / EDITS).read_text())}
    fused = "model.layers.1.mlp.experts.down_proj"
    if fused in edits:
        assert edits[fused]["experts"] == [0, 2]
        assert edits[fused.replace(".1.", ".2.")]["experts"] is None
    else:
        names = [name for name in edits if "layers.1.block_sparse_moe" in name]
        assert [name.split(".")[5] for name in names] == ["0", "2"]
    assert max(edit["leak"] for edit in edits.values()) < 1e-6
    found = verify(base, out, subspace=file)
    assert found.ok, found.faults
    assert found.max_leak < 1e-6
    every_byte = sum(p.stat().st_size for p in base.iterdir() if p.name != "config.json")
    assert found.identical_bytes + found.edited_bytes == every_byte
    one = D_MODEL * 48 * 4
    assert found.edited_bytes == 6 * one + 3 * D_MODEL * D_MODEL * 4


def test_an_expert_that_was_not_to_be_edited_is_a_fault(baked, tmp_path):
    base, file, out = baked
    damaged = Path(shutil.copytree(out, tmp_path / "damaged"))
    tensors = load_file(damaged / "model.safetensors")
    fused = "model.layers.1.mlp.experts.down_proj"
    name = fused if fused in tensors else "model.layers.1.block_sparse_moe.experts.1.w2.weight"
    part = tensors[name][1] if tensors[name].dim() == 3 else tensors[name]
    part[0, 0] += 1
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    faults = verify(base, damaged, subspace=file).faults
    assert any(
        "expert 1 of model.layers.1.mlp.experts.down_proj differs" in fault
        or "experts.1.w2.weight differs from the base's" in fault
        for fault in faults
    )


def test_experts_that_the_base_does_not_have_are_a_fault(baked):
    base, file, out = baked
    edits = json.loads((out / EDITS).read_text())
    edits[-1]["experts"] = [10**6]
    (out / EDITS).write_text(json.dumps(edits))
    assert any(
        "names experts [1000000]" in fault for fault in verify(base, out, subspace=file).faults
    )


@pytest.mark.parametrize(
    ("experts", "row"),
    [
        ((0, 7), "| Routed experts edited | 0, 7 of every block |"),
        (
            {"3-5": (0, 7), "9": "all"},
            "| Routed experts edited | `3-5` `[0, 7]`, `9` `all` (by blocks, counted from 0; "
            "in all others none) |",
        ),
        (None, None),
    ],
)
def test_the_card_names_the_chosen_experts(experts, row):
    record = demo_record()
    edit = record.edit.model_copy(update={"experts": experts})
    card = render_card(
        RunRecord.model_validate_json(record.model_copy(update={"edit": edit}).model_dump_json())
    )
    rows = [line for line in card.splitlines() if line.startswith("| Routed experts edited")]
    assert rows == ([] if row is None else [row])


def test_a_build_records_the_experts_that_its_recipe_chose(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setitem(architectures.WANTED, "vocab_size", tiny.VOCABULARY)
    folder = save("qwen3_moe", tmp_path / "model")
    tiny_tokenizer.save_pretrained(folder)
    (tmp_path / "target.txt").write_text("\n".join(TARGET))
    (tmp_path / "neutral.txt").write_text("\n".join(NEUTRAL))
    (tmp_path / "r.yaml").write_text(
        f"model: {folder}\nlayers: [2]\nk: 1\n"
        "prompts: {target: {path: target.txt}, neutral: {path: neutral.txt}}\n"
        "edit: {experts: {1: [2, 0], 2: all}}\n"
        "rollouts: {max_new_tokens: 2, limit: 2}\n"
    )
    recipe = load_recipe(tmp_path / "r.yaml")
    record = pipeline.build(recipe, tmp_path / "out", options=Options("cpu"))
    assert record.edit.experts == {"1": (2, 0), "2": "all"}
    assert record.edit.strength == {"attention": 1, "expert": {"0": 0, "1-2": 1}}
    card = (tmp_path / "out" / "checkpoint" / "README.md").read_text()
    assert "| Routed experts edited | `1` `[2, 0]`, `2` `all` (by blocks" in card
