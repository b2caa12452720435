import hashlib
import json
import math
import shutil
import struct
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from abliterator.anatomy import anatomy_of
from abliterator.bake import bake, plan_edits, preview_edit
from abliterator.checkpoint import Checkpoint
from abliterator.errors import RecipeError, UnsupportedModel
from abliterator.model import load_model
from abliterator.recipe import Edit
from abliterator.subspace import orthonormal_basis
from tests.helpers.architectures import save
from tests.helpers.leak import leak_meter
from tests.helpers.tiny import D_MODEL, FAMILIES, N_LAYERS, VOCABULARY


def random_basis(k: int = 3) -> torch.Tensor:
    return orthonormal_basis(torch.randn(k, D_MODEL, generator=torch.Generator().manual_seed(3)))


def by_block(*strengths: float) -> dict[int, float]:
    return dict(enumerate(strengths))


def baked(folder: Path, out: Path, *, k: int = 3, **settings):
    checkpoint = Checkpoint.open(folder)
    plan = plan_edits(checkpoint, anatomy_of(checkpoint.config), Edit(**settings))
    return bake(checkpoint, plan, random_basis(k), out), plan


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return found


def raw_tensors(path: Path) -> tuple[bytes, dict[str, bytes]]:
    """Header bytes and tensor bytes of a safetensors file, read by struct and json alone."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    start = 8 + length
    spans = {name: entry["data_offsets"] for name, entry in header.items()}
    return data[:start], {name: data[start + a : start + b] for name, (a, b) in spans.items()}


def vanilla(folder: Path) -> torch.nn.Module:
    remote = (folder / "modeling_qwen.py").exists()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=remote
    )
    return model.eval()


def random_tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(4, VOCABULARY, (3, 11), generator=generator)


# ---- the edit is what it says, on every architecture


@pytest.mark.parametrize("family", FAMILIES)
def test_no_block_writes_into_the_subspace(family, tiny_folder, tmp_path):
    """The leak meter needs no anatomy: it is how an edit is proven on any architecture."""
    before = leak_meter(vanilla(tiny_folder(family)), random_basis(), random_tokens())
    baked(tiny_folder(family), tmp_path / "out")
    after = leak_meter(vanilla(tmp_path / "out"), random_basis(), random_tokens())
    assert len(after) == N_LAYERS
    assert min(before) > 0.05
    assert max(after) < 1e-6


@pytest.mark.parametrize("family", ["llama_biased", "qwen"])
def test_biases_left_alone_leak(family, tiny_folder, tmp_path):
    if family == "llama_biased":
        baked(tiny_folder(family), tmp_path / "out", biases=False)
        leaks = leak_meter(vanilla(tmp_path / "out"), random_basis(), random_tokens())
        assert min(leaks) > 1e-3  # which is why biases are edited by default
    else:
        edits, _ = baked(tiny_folder(family), tmp_path / "out", biases=False)
        assert all(edit.name.endswith(".weight") for edit in edits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"strength": {"attention": 1.0, "mlp": 0.3}},
        {"strength": {"attention": by_block(1.0, 0.0, 0.4), "mlp": by_block(0.0, 0.6, 1.0)}},
    ],
)
def test_preview_and_baked_weights_agree(family, settings, tiny_folder, tiny_loaded, tmp_path):
    _, plan = baked(tiny_folder(family), tmp_path / "out", **settings)
    loaded, tokens = tiny_loaded(family), random_tokens()
    with torch.inference_mode():
        plain = loaded.model(tokens).logits
        with preview_edit(loaded, plan, random_basis()):
            previewed = loaded.model(tokens).logits
        wrote = vanilla(tmp_path / "out")(tokens).logits
    torch.testing.assert_close(previewed, wrote, rtol=1e-4, atol=2e-4)
    assert (plain - wrote).abs().max() > 0.01  # the edit does something


def test_preview_without_biases_keeps_them(tiny_folder, tiny_loaded, tmp_path):
    _, plan = baked(tiny_folder("llama_biased"), tmp_path / "out", biases=False)
    loaded = tiny_loaded("llama_biased")
    with torch.inference_mode(), preview_edit(loaded, plan, random_basis()):
        previewed = loaded.model(random_tokens()).logits
        wrote = vanilla(tmp_path / "out")(random_tokens()).logits
    torch.testing.assert_close(previewed, wrote, rtol=1e-4, atol=2e-4)


def test_embeddings_are_edited_on_their_rows(tiny_folder, tmp_path):
    baked(tiny_folder(), tmp_path / "out", embeddings=True)
    stream = vanilla(tmp_path / "out").get_input_embeddings()(random_tokens())
    assert (stream.double() @ random_basis()).abs().max() < 1e-6


def test_column_norms_are_kept(tiny_folder, tmp_path):
    edits, _ = baked(tiny_folder(), tmp_path / "out", norm="column")
    before, after = tensors_of(tiny_folder()), tensors_of(tmp_path / "out")
    for edit in edits:
        torch.testing.assert_close(
            before[edit.name].norm(dim=0), after[edit.name].norm(dim=0), rtol=1e-5, atol=0
        )
        assert edit.leak < 1e-6


def test_experts_are_edited_as_the_mlp_is_unless_they_are_named(tmp_path):
    folder = save("qwen2_moe", tmp_path / "base")

    def edited(**strength):
        edits, _ = baked(folder, tmp_path / "out", strength=strength)
        return {edit.component for edit in edits}

    everything = {"attention", "expert", "shared_expert"}
    assert edited(attention=1.0, mlp=1.0) == everything
    assert edited(attention=1.0, mlp=1.0, expert=0.0) == everything - {"expert"}
    assert edited(attention=1.0) == {"attention"}
    assert edited(expert=1.0) == {"expert"}


def test_edits_through_a_gain_name_it(tmp_path):
    edits, _ = baked(save("gemma2", tmp_path / "base"), tmp_path / "out")
    assert edits[0].gains == ("model.layers.0.post_feedforward_layernorm.weight",)
    assert max(edit.leak for edit in edits) < 1e-6


def test_an_embedding_before_a_norm_is_not_edited(tmp_path):
    with pytest.raises(UnsupportedModel, match="no exact form for a bloom"):
        baked(save("bloom", tmp_path / "base"), tmp_path / "out", embeddings=True)


# ---- bytes


@pytest.mark.parametrize("options", [{}, {"shard_size": "30KB"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_other_byte_is_the_bases(options, dtype, tiny_folder, tmp_path):
    base = tiny_folder("llama_biased", dtype=dtype, **options)
    edits, _ = baked(base, tmp_path / "out")
    edited = {edit.name: edit for edit in edits}
    assert len(edited) == N_LAYERS * 4
    files = sorted(path.name for path in base.glob("*.safetensors"))
    assert (len(files) > 1) == bool(options)
    for name in files:
        header, tensors = raw_tensors(base / name)
        header_after, tensors_after = raw_tensors(tmp_path / "out" / name)
        assert header_after == header
        assert tensors_after.keys() == tensors.keys()
        for tensor, data in tensors.items():
            after = tensors_after[tensor]
            assert (data == after) == (tensor not in edited)
            if tensor in edited:
                report = edited[tensor]
                assert hashlib.sha256(data).hexdigest() == report.sha256_before
                assert hashlib.sha256(after).hexdigest() == report.sha256_after


def test_a_strength_of_zero_leaves_a_component_alone(tiny_folder, tmp_path):
    edits, plan = baked(tiny_folder(), tmp_path / "out", strength={"attention": 1.0, "mlp": 0.0})
    assert {edit.component for edit in edits} == {"attention"}
    assert len(plan.edits) == N_LAYERS


def test_a_strength_by_block_is_what_the_stored_bytes_have(tiny_folder, tmp_path):
    given = {"attention": (1.0, 0.0, 0.4), "mlp": (0.0, 0.6, 1.5)}
    base = tiny_folder("llama", dtype=torch.bfloat16)
    strength = {component: by_block(*values) for component, values in given.items()}
    edits, _ = baked(base, tmp_path / "out", strength=strength)
    assert {(e.component, e.layer): e.strength for e in edits} == {
        (component, layer): strength
        for component, strengths in given.items()
        for layer, strength in enumerate(strengths)
        if strength
    }
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    q = random_basis().double()
    for edit in edits:
        wrote, left = ((q.T @ w[edit.name].double()).norm() for w in (before, after))
        assert float(left / wrote) == pytest.approx(abs(1 - edit.strength), abs=1e-3)
    alone = before.keys() - {edit.name for edit in edits}
    assert "model.layers.1.self_attn.o_proj.weight" in alone
    assert all(before[name].equal(after[name]) for name in alone)


def test_experts_have_the_mlps_strengths_by_block_too(tmp_path):
    folder = save("qwen2_moe", tmp_path / "base")
    _, plan = baked(folder, tmp_path / "all")
    layers = {edit.writer.layer for edit in plan.edits}
    last = {max(layers): 1.0}
    edits, _ = baked(folder, tmp_path / "last", strength={"mlp": last})
    assert {edit.component for edit in edits} == {"expert", "shared_expert"}
    assert {edit.layer for edit in edits} == {max(layers)}


def test_strengths_of_blocks_that_the_model_does_not_have(tiny_folder, tmp_path):
    with pytest.raises(
        RecipeError, match=r"`edit.strength.mlp.1-3` names block 3, .* blocks 0 to 2"
    ):
        baked(tiny_folder(), tmp_path / "out", strength={"mlp": {"1-3": 1.0}})


def test_files_a_loader_needs_are_carried(tiny_folder, tmp_path):
    base = tiny_folder("qwen")
    baked(base, tmp_path / "out")
    for name in ("tokenizer.json", "modeling_qwen.py", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def test_config_is_the_bases_but_for_what_would_be_false(tiny_folder, tmp_path):
    base = Path(shutil.copytree(tiny_folder(), tmp_path / "base"))
    before = json.loads((base / "config.json").read_text())
    odd = {"_name_or_path": "/home/someone/x", "limit": [0.0, math.inf], "tiny": 1e-30}
    odd |= {"auto_map": {"AutoConfig": "org/code--configuration.Config"}, "abliterator": {"old": 1}}
    (base / "config.json").write_text(json.dumps({**odd, **before}))
    baked(base, tmp_path / "out")
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after.pop("abliterator") == {"version": version("abliterator")}
    for false_now in ("_name_or_path", "abliterator"):
        odd.pop(false_now)
    assert after == {**odd, **before}
    assert list(after) == [*odd, *(key for key in before if key not in odd)]


def test_the_entry_in_the_config_goes_unnoticed(tiny_folder, tmp_path):
    """Plain transformers, all its warnings on: not a word, and the entry is kept when saved."""
    baked(tiny_folder("qwen3"), tmp_path / "out")
    script = (
        "import sys, transformers as t; t.utils.logging.set_verbosity_info()\n"
        "config = t.AutoConfig.from_pretrained(sys.argv[1])\n"
        "model = t.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(config.abliterator['version'], model.config.to_dict()['abliterator']['version'])"
    )
    command = [sys.executable, "-W", "error", "-c", script, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [version("abliterator")] * 2
    told = done.stderr.replace("Model config", "").lower()
    assert not any(word in told for word in ("warn", "unused", "unexpected", "ignor")), done.stderr


# ---- the reported leak


@pytest.mark.parametrize(
    ("dtype", "rounding", "most"),
    [
        (torch.float32, "nearest", 1e-6),
        (torch.bfloat16, "nearest", 3e-2),
        (torch.bfloat16, "compensated", 3e-3),
        (torch.float16, "compensated", 4e-4),
    ],
)
def test_the_leak_is_that_of_the_stored_bytes(dtype, rounding, most, tiny_folder, tmp_path):
    base = tiny_folder("llama", dtype=dtype)
    edits, _ = baked(base, tmp_path / "out", k=1, rounding=rounding)
    before, after, q = tensors_of(base), tensors_of(tmp_path / "out"), random_basis(1)
    for edit in edits:
        wrote, left = ((q.T @ w[edit.name].double()).norm() for w in (before, after))
        assert edit.leak == pytest.approx(float(left / wrote), rel=1e-2, abs=1e-7)
        assert edit.leak < most


def test_half_a_strength_leaks_half(tiny_folder, tmp_path):
    edits, _ = baked(tiny_folder(), tmp_path / "out", strength={"attention": 0.5, "mlp": 0.5})
    assert [edit.leak for edit in edits] == pytest.approx([0.5] * len(edits), rel=1e-5)


def test_the_same_edit_twice_is_bit_equal(tiny_folder, tmp_path):
    base = tiny_folder("llama", dtype=torch.bfloat16)
    first, _ = baked(base, tmp_path / "a")
    second, _ = baked(base, tmp_path / "b")
    assert first == second


# ---- refusals


def test_tied_embeddings_are_not_edited(tiny_folder, tmp_path):
    with pytest.raises(UnsupportedModel, match="tied"):
        baked(tiny_folder("llama_tied"), tmp_path / "out", embeddings=True)


def test_a_subspace_of_another_model(tiny_folder, tmp_path):
    checkpoint = Checkpoint.open(tiny_folder())
    plan = plan_edits(checkpoint, anatomy_of(checkpoint.config), Edit())
    wrong = orthonormal_basis(torch.randn(1, D_MODEL * 2))
    with pytest.raises(UnsupportedModel, match=f"{2 * D_MODEL} dimensions"):
        bake(checkpoint, plan, wrong, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_column_norms_have_no_preview(tiny_folder, tiny_loaded, tmp_path):
    _, plan = baked(tiny_folder(), tmp_path / "out", norm="column")
    with (
        pytest.raises(RecipeError, match="no run-time form"),
        preview_edit(tiny_loaded(), plan, random_basis()),
    ):
        pass


def test_preview_leaves_no_hook_behind(tiny_folder, tiny_loaded, tmp_path):
    _, plan = baked(tiny_folder(), tmp_path / "out")
    loaded = tiny_loaded()
    with pytest.raises(ZeroDivisionError), preview_edit(loaded, plan, random_basis()):
        raise ZeroDivisionError
    assert not any(module._forward_hooks for module in loaded.model.modules())


def test_the_baked_folder_reloads_as_the_same_kind_of_model(tiny_folder, tmp_path):
    baked(tiny_folder("qwen3"), tmp_path / "out")
    loaded = load_model(tmp_path / "out", device="cpu", dtype=None)
    assert loaded.model.config.model_type == "qwen3"
