"""Every format of packed numbers, kept and as plain numbers: leak, noise, bytes, and loading."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from abliterator.anatomy import anatomy_of
from abliterator.bake import preview_edit
from abliterator.checkpoint import Checkpoint
from abliterator.cli import main
from abliterator.costs import shape_of
from abliterator.errors import AbliteratorError
from abliterator.formats import storage_of
from abliterator.model import load_model
from abliterator.pipeline import bake_subspace, plan_model
from abliterator.recipe import Edit
from abliterator.subspace import ablate
from abliterator.verification import EDITS, verify
from tests.helpers import tiny
from tests.helpers.baked import baked, basis, planned, rms, stored
from tests.helpers.leak import leak_meter
from tests.helpers.packed import BY_LIBRARY, PACKED, reference
from tests.helpers.quantised import save_quantised

# transformers warns of the very argument with which it is to be told to decode on loading
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")

TOKENS = torch.randint(4, 64, (2, 7), generator=torch.Generator().manual_seed(1))
EXPERTS = ("int4_group experts", "modelopt experts", "gptq experts")
WAYS = ("keep", "dequantize")
LISTS = {"int": "ignore", "nvf": "ignore", "mod": "ignore", "awq": "modules_to_not_convert"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """`base(name)`: the folder of a packed model with its tokenizer; made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = save_quantised(name, tmp_path_factory.mktemp("packed") / "base")
            tiny.train_tokenizer().save_pretrained(made[name])
        return made[name]

    return make


def parts_of(tensors, module):
    """A module's tensors by the ends of their names."""
    return {
        name.removeprefix(f"{module}."): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{module}.")
    }


def weights(name, folder):
    """Every writer's matrix as its format's own tools read it, by module; plain ones too."""
    tensors, found = stored(folder), {}
    for module in {n.rpartition(".")[0] for n in tensors if "o_proj" in n or "down_proj" in n}:
        parts = parts_of(tensors, module)
        plain = parts.keys() == {"weight"}
        found[module] = parts["weight"] if plain else reference(name.split()[0], parts)
    return {module: weight.double() for module, weight in found.items()}


def module_of(edit):
    return edit.name.rpartition(".")[0]


@pytest.mark.parametrize("k", [1, 4, 16])
@pytest.mark.parametrize("name", PACKED)
def test_leak_and_noise_of_both_ways(name, k, base, tmp_path):
    """Against the matrices that the format's own tools read from both checkpoints."""
    folder, q = base(name), basis(k)
    before, found = weights(name, folder), {}
    for rounding, way in (("nearest", "keep"), ("compensated", "keep"), ("", "dequantize")):
        out = tmp_path / (rounding or way)
        settings = {"rounding": rounding} if rounding else {}
        edits = baked(folder, out, k=k, quantized=way, **settings)
        after, noise = weights(name, out), []
        for edit in edits:
            old, new = before[module_of(edit)], after[module_of(edit)]
            exact = ablate(old, q, 1.0)
            assert edit.leak == pytest.approx(
                float((q.T @ new).norm() / (q.T @ old).norm()), rel=0.05
            )
            assert edit.noise == pytest.approx(float((new - exact).norm() / old.norm()), rel=1e-3)
            noise.append(edit.noise)
        found[rounding or way] = max(edit.leak for edit in edits), rms(noise)
    nearest, kept, plain = found.values()
    eight = name in ("int8_group", "int8_row", "gptq_v2")
    assert nearest[0] > 3 * kept[0]
    assert kept[0] < (2e-3 if eight else 3e-2)
    assert kept[1] < (1.5 if eight or k > 1 else 2) * nearest[1]
    assert plain[0] < 1e-4
    assert plain[1] < 3e-3  # that of bfloat16


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*PACKED, *EXPERTS])
def test_all_other_bytes_are_the_bases_and_it_verifies(name, way, base, tmp_path):
    """Compared by a reader of its own, tensor by tensor."""
    folder, out = base(name), tmp_path / "out"
    edits = baked(folder, out, k=3, quantized=way)
    before, after = stored(folder), stored(out)
    same = {
        tensor
        for tensor in before.keys() & after.keys()
        if before[tensor].dtype == after[tensor].dtype
        and torch.equal(*(side[tensor].reshape(-1).view(torch.uint8) for side in (before, after)))
    }
    if way == "keep":
        assert before.keys() == after.keys()
        assert before.keys() - same == {edit.name for edit in edits}
    else:
        units = {_unit(edit.name) for edit in edits}
        assert all(_unit(tensor) in units for tensor in before.keys() ^ after.keys())
        assert all(tensor in same for tensor in before if _unit(tensor) not in units)
        added = after.keys() - same
        assert all(tensor.endswith("_proj.weight") for tensor in added)
        assert {after[tensor].dtype for tensor in added} == {torch.bfloat16}
    subspace = tmp_path / "q.safetensors"
    save_file({"subspace": basis(3).float().contiguous()}, subspace)
    assert verify(folder, out, subspace=subspace).faults == ()
    for edit in (edits[0], edits[-1]):
        owner = storage_of(Checkpoint.open(folder).config).owner(edit.name)
        _flip(out, edit.name if way == "keep" else owner)
        assert not verify(folder, out).ok
        _flip(out, edit.name if way == "keep" else owner)
    companion = sorted(after.keys() - {edit.name for edit in edits})[-3]
    _flip(out, companion)
    assert any(companion in fault for fault in verify(folder, out).faults)


def _unit(tensor):
    before, experts, _ = tensor.partition(".experts.")
    return before if experts else tensor.rpartition(".")[0]


def _flip(folder, name):
    checkpoint = Checkpoint.open(folder)
    info = checkpoint.tensors[name]
    with (folder / info.file).open("r+b") as stream:
        stream.seek(info.start)
        byte = stream.read(1)[0]
        stream.seek(info.start)
        stream.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*PACKED, *EXPERTS])
def test_it_loads_and_is_the_preview(name, way, base, tmp_path):
    """By decoding the weights of every format as they are loaded, on any machine."""
    folder = base(name)
    baked(folder, tmp_path, k=3, quantized=way)
    _, plan = planned(folder, quantized=way)
    loaded = load_model(folder, device="cpu", dtype="float32")
    with torch.inference_mode():
        untouched = loaded.model(TOKENS).logits
        with preview_edit(loaded, plan, basis(3)):
            wanted = loaded.model(TOKENS).logits
        edited = load_model(tmp_path, device="cpu", dtype="float32")
        got = edited.model(TOKENS).logits
    far = float((wanted - untouched).norm() / wanted.norm())
    off = float((got - wanted).norm() / wanted.norm())
    assert far > 0.1
    assert off < (0.02 if way == "dequantize" else 0.4)
    if way == "dequantize":
        assert max(leak_meter(edited.model.eval(), basis(3), TOKENS)) < 1e-3


@pytest.mark.parametrize(
    ("name", "way"),
    # it drops experts in plain numbers where it expects packed ones (5.24)
    [*((name, way) for name in BY_LIBRARY for way in WAYS), ("int4_group experts", "keep")],
)
def test_transformers_itself_loads_it_too(name, way, base, tmp_path):
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    folder = base(name)
    baked(folder, tmp_path, k=3, quantized=way)
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=CompressedTensorsConfig(dequantize=True),
        dtype=torch.float32,
        output_loading_info=True,
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ours = load_model(tmp_path, device="cpu", dtype="float32").model
    with torch.inference_mode():
        got, wanted = (m.eval()(TOKENS).logits for m in (model, ours))
    assert float((got - wanted).norm() / wanted.norm()) < 0.03  # scales, rounded to bfloat16 there


@pytest.mark.parametrize("name", [*PACKED, *EXPERTS])
def test_the_config_says_what_is_no_longer_quantised(name, base, tmp_path):
    baked(base(name), tmp_path, quantized="dequantize", strength={"attention": 1.0, "mlp": {1: 1}})
    before, after = (
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (base(name), tmp_path)
    )
    down = "experts" if "experts" in name else "down_proj"
    edited = {"model.layers.0.self_attn.o_proj", f"model.layers.1.mlp.{down}"}
    if name.startswith("gptq"):
        rules = after.pop("dynamic")
        assert len(rules) == 3
        assert all(rule.startswith("-:^model\\.layers\\.") for rule in rules)
        (still,) = after.pop("modules_in_block_to_quantize")
        assert not edited & set(still)
        assert "model.layers.0.self_attn.q_proj" in still
        assert any(module.startswith(f"model.layers.0.mlp.{down}") for module in still)
    else:
        listed = after.pop(LISTS[name[:3]])
        patterns = {"int4_group experts": "re:model[.]layers[.]1[.]mlp[.]experts[.].*"}
        patterns["modelopt experts"] = "model.layers.1.mlp.experts*"
        assert {"model.layers.0.self_attn.o_proj", "lm_head"} <= set(listed)
        assert patterns.get(name, f"model.layers.1.mlp.{down}") in listed
        assert not any("layers.0.mlp" in entry or "q_proj" in entry for entry in listed)
        before.pop(LISTS[name[:3]])
    assert after == before


def test_modelopts_second_file_lists_the_same_modules(base, tmp_path):
    folder, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(base("modelopt"), folder)
    inner = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": inner}))
    baked(folder, out, quantized="dequantize")
    second = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    first = json.loads((out / "config.json").read_text())["quantization_config"]
    assert second == {**inner, "exclude_modules": first["ignore"]}
    assert verify(folder, out).ok
    (out / "hf_quant_config.json").write_text("{}")
    assert verify(folder, out).faults == (
        "hf_quant_config.json is not what the edit makes of the base's.",
    )
    baked(folder, tmp_path / "kept", quantized="keep")
    kept, own = (f / "hf_quant_config.json" for f in (tmp_path / "kept", folder))
    assert kept.read_bytes() == own.read_bytes()


HOSTILE = {
    "zero points out of range": ("gptq", "qzeros", lambda t: torch.full_like(t, -1)),
    "groups out of range": ("gptq", "g_idx", lambda t: t + 1),
    "truncated scales": ("int4_group", "weight_scale", lambda t: t[:-1].contiguous()),
    "a scale that is infinite": ("int8_row", "weight_scale", lambda t: t / 0),
    "one number that is 0": ("nvfp4", "weight_global_scale", torch.zeros_like),
    "another shape": ("int4_row", "weight_shape", lambda t: t - 1),
}


def rewritten(folder, out, change):
    """A copy of a checkpoint, its tensors as `change` leaves them."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def refuses(folder, tmp_path, match):
    """Whether a bake stops with a named error before anything is written."""
    subspace, out = tmp_path / "q.safetensors", tmp_path / "out"
    save_file({"subspace": basis(1).float().contiguous()}, subspace)
    for way in WAYS:
        with pytest.raises(AbliteratorError, match=match):
            bake_subspace(str(folder), subspace, out, edit=Edit(quantized=way))
        assert not list(out.rglob("*")) if out.exists() else True
    return True


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_parts_stop_before_anything_is_written(case, base, tmp_path):
    name, end, change = HOSTILE[case]

    def damage(tensors):
        tensor = f"model.layers.1.mlp.down_proj.{end}"
        tensors[tensor] = change(tensors[tensor])

    assert refuses(rewritten(base(name), tmp_path / "base", damage), tmp_path, "down_proj")


def test_two_formats_in_one_checkpoint_are_named(base, tmp_path):
    """Of one weight, of two, and a format that config.json does not say."""

    def twice(tensors):
        tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(256, 384)

    folder = rewritten(base("int4_group"), tmp_path / "twice", twice)
    assert refuses(folder, tmp_path, "one weight in two forms")

    def mixed(tensors):
        for tensor in [name for name in tensors if "layers.1.mlp.down_proj" in name]:
            del tensors[tensor]
        for end, part in parts_of(stored(base("awq")), "model.layers.1.mlp.down_proj").items():
            tensors[f"model.layers.1.mlp.down_proj.{end}"] = part

    folder = rewritten(base("int4_group"), tmp_path / "mixed", mixed)
    assert refuses(folder, tmp_path, "quantised by awq, as its tensor")
    folder = rewritten(base("nvfp4"), tmp_path / "silent", lambda _: None)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    assert refuses(folder, tmp_path, "does not say so")


def test_the_plan_says_what_each_way_costs(base):
    shown = CliRunner().invoke(main, ["plan", str(base("int4_group"))]).stdout
    assert "4 tensors: int4, a scale a group; keep:" in shown
    (entry,) = plan_model(str(base("nvfp4")), base("nvfp4").parent / "out").summary()["quantised"]
    assert (entry["format"], entry["way"]) == ("NVFP4", "keep")
    assert entry["keep"]["bytes"] < entry["dequantize"]["bytes"]
    assert entry["keep"]["leak"] > entry["dequantize"]["leak"]


@pytest.mark.parametrize("name", PACKED)
def test_parameters_are_counted_in_numbers(name, base):
    checkpoint = Checkpoint.open(base(name))
    found = shape_of(checkpoint, anatomy_of(checkpoint.config))
    loaded = load_model(base(name), device="cpu", dtype="float32").model
    assert found.parameters == sum(p.numel() for p in loaded.parameters())


def test_edits_of_a_packed_model_say_how_it_is_stored(base, tmp_path):
    baked(base("awq"), tmp_path, quantized="keep")
    edits = json.loads((tmp_path / EDITS).read_text())
    assert {edit["storage"] for edit in edits} == {"int4, a scale a group"}
    assert {tuple(edit["shape"]) for edit in edits} == {(256, 32), (384, 32)}
