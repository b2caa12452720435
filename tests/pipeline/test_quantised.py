"""Every quantised format, kept and written as plain numbers: leak, noise, bytes, and loading."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import save_file

from abliterator.bake import bake, preview_edit
from abliterator.checkpoint import Checkpoint
from abliterator.cli import main
from abliterator.formats import storage_of
from abliterator.model import load_model
from abliterator.pipeline import bake_subspace
from abliterator.pipeline._planning._plan import make_plan
from abliterator.pipeline._planning._quantization import quantized_edits
from abliterator.recipe import Edit
from abliterator.source import ModelSource
from abliterator.subspace import ablate
from abliterator.verification import EDITS, verify
from tests.helpers import tiny
from tests.helpers.baked import baked, basis, planned, rms, stored
from tests.helpers.leak import leak_meter
from tests.helpers.quantised import FORMATS, save_quantised

# transformers warns of the very argument with which it is to be told to decode on loading
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")

DENSE = tuple(FORMATS)
EXPERTS = ("fp8_block experts", "compressed_row experts")
ALL = (*DENSE, *EXPERTS, "mxfp4")
TOKENS = torch.randint(4, 64, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """`base(name, **options)`: the folder of a quantised model; made once."""
    made: dict[tuple, Path] = {}

    def make(name: str, **options: object) -> Path:
        key = name, *options.items()
        if key not in made:
            folder = tmp_path_factory.mktemp("quantised") / "base"
            made[key] = save_quantised(name, folder, **options)
        return made[key]

    return make


def run(folder, **options):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    stored_as = getattr(config, "quantization_config", {})
    if stored_as.get("quant_method") in ("fp8", "mxfp4"):
        stored_as["dequantize"] = True  # by itself only where there is no GPU
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, output_loading_info=True, **options
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


def logits(folder, **options):
    with torch.inference_mode():
        return run(folder, **options)(TOKENS).logits


def as_loaded(name):
    """How transformers is to load a format; compressed-tensors needs its package."""
    if not name.startswith("compressed"):
        return {}
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    return {"quantization_config": CompressedTensorsConfig(dequantize=True)}


@pytest.mark.parametrize("k", [1, 3, 16])
@pytest.mark.parametrize("name", ALL)
def test_leak_and_noise_of_both_ways(name, k, base, tmp_path):
    folder = base(name)
    kept, plain, dequantized = (
        [edit for edit in baked(folder, tmp_path / str(i), k=k, **way) if edit.storage]
        for i, way in enumerate(
            [
                {"quantized": "keep"},
                {"quantized": "keep", "rounding": "nearest"},
                {"quantized": "dequantize"},
            ]
        )
    )
    worse = 5 if name == "mxfp4" else 20
    assert min(edit.leak for edit in plain) > worse * max(edit.leak for edit in kept)
    assert max(edit.leak for edit in kept) < (2e-2 if name == "mxfp4" else 1e-3)
    assert rms([edit.noise for edit in kept]) < 1.5 * rms([edit.noise for edit in plain])
    assert max(edit.leak for edit in dequantized) < 1e-4
    assert max(edit.noise for edit in dequantized) < 3e-3  # that of bfloat16
    for first, second in zip(kept, plain, strict=True):
        assert first.noise_nearest == pytest.approx(second.noise, rel=1e-4)


def test_the_noise_that_is_told_against_the_matrices_themselves(base, tmp_path):
    folder = base("compressed_row")
    edits = [edit for edit in baked(folder, tmp_path, quantized="keep") if edit.storage]
    before, after = stored(folder), stored(tmp_path)
    for edit in edits:
        old, new = (
            side[edit.name].double() * side[edit.name + "_scale"].double()
            for side in (before, after)
        )
        exact = ablate(old, basis(1), 1.0)
        assert edit.noise == pytest.approx(float((new - exact).norm() / old.norm()), rel=1e-3)


@pytest.mark.parametrize("way", ["keep", "dequantize"])
@pytest.mark.parametrize("name", ALL)
def test_all_other_tensors_are_the_bases(name, way, base, tmp_path):
    """Compared by a reader of its own, tensor by tensor."""
    folder = base(name)
    edited = {edit.name for edit in baked(folder, tmp_path, quantized=way)}
    before, after = stored(folder), stored(tmp_path)
    same = {
        tensor
        for tensor in before.keys() & after.keys()
        if before[tensor].dtype == after[tensor].dtype
        and torch.equal(before[tensor].view(torch.uint8), after[tensor].view(torch.uint8))
    }
    if way == "keep":
        assert before.keys() == after.keys()
        assert before.keys() - same == edited
        return
    storage = storage_of(Checkpoint.open(folder).config)
    quantised = {edit for edit in edited if storage.owner(edit) in before and "proj" in edit}
    gone = before.keys() - same
    modules = {_unit(tensor) for tensor in quantised}
    assert edited <= gone
    assert all(_unit(tensor) in modules for tensor in gone)
    assert all(
        after[tensor].dtype == torch.bfloat16 for tensor in after.keys() - same
    )  # and the names of the scales are gone


def _unit(tensor):
    before, experts, _ = tensor.partition(".experts.")
    return before if experts else tensor.rpartition(".")[0]


@pytest.mark.parametrize("way", ["keep", "dequantize"])
@pytest.mark.parametrize("name", ALL)
def test_transformers_loads_it_and_it_is_the_preview(name, way, base, tmp_path):
    """Plain numbers give the hook preview's logits up to bfloat16's rounding, FP8 up to its own."""
    folder, options = base(name), as_loaded(name)
    baked(folder, tmp_path, k=3, quantized=way)
    _, plan = planned(folder, quantized=way)
    model = run(folder, **options)
    with torch.inference_mode(), preview_edit(_Loaded(model, folder), plan, basis(3)):
        wanted = model(TOKENS).logits
    untouched = logits(folder, **options)
    got = logits(tmp_path, **options)
    far = float((wanted - untouched).norm() / wanted.norm())
    off = float((got - wanted).norm() / wanted.norm())
    assert far > 0.1
    assert off < (0.01 if way == "dequantize" else 0.15)
    if way == "dequantize":
        leaks = leak_meter(run(tmp_path, **options), basis(3), TOKENS)
        assert max(leaks) < 1e-3


class _Loaded:
    """As `load_model` gives it, for a model that was loaded another way."""

    def __init__(self, model, folder):
        self.model, self.folder, self.device = model, folder, "cpu"


@pytest.mark.parametrize("way", ["keep", "dequantize"])
@pytest.mark.parametrize("name", ["fp8_block experts", "compressed_row", "mxfp4"])
def test_verify_passes_and_names_what_is_forged(name, way, base, tmp_path):
    """In shards: headers, index and config.json are what the edit makes of the base's."""
    folder, out = base(name, shard_size="300KB"), tmp_path / "out"
    baked(folder, out, k=3, quantized=way)
    subspace = tmp_path / "q.safetensors"
    save_file({"subspace": basis(3).float().contiguous()}, subspace)
    found = verify(folder, out, subspace=subspace)
    assert found.faults == ()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    held = {
        tensor: path.name
        for path in out.glob("*.safetensors")
        for tensor in safe_open(path, "pt").keys()  # noqa: SIM118  a reader is no mapping
    }
    assert index["weight_map"] == held
    if way == "keep":
        return
    size = sum(t.numel() * t.element_size() for t in stored(out).values())
    assert index["metadata"]["total_size"] == size
    for file, old, new in (
        ("config.json", '"vocab_size": 64', '"vocab_size": 65'),
        ("model.safetensors.index.json", '"total_size": ', '"total_size": 1'),
        (EDITS, '"dequantized": true', '"dequantized": false'),
    ):
        path = out / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        assert not verify(folder, out).ok
        path.write_text(text)
    neighbour = "gate_proj.weight" if "experts" in name else "gate_up_proj"
    if name != "compressed_row":  # what only lost its scales is compared too
        _flip(out, neighbour)
        (fault,) = verify(folder, out).faults
        assert neighbour in fault


def _flip(folder, ending):
    checkpoint = Checkpoint.open(folder)
    info = next(info for name, info in checkpoint.tensors.items() if name.endswith(ending))
    with (folder / info.file).open("r+b") as stream:
        stream.seek(info.start)
        byte = stream.read(1)[0]
        stream.seek(info.start)
        stream.write(bytes([byte ^ 1]))


LISTED = {
    "fp8_block experts": ("modules_to_not_convert", "model.layers.{}.mlp.experts"),
    "compressed_row experts": ("ignore", "re:model[.]layers[.]{}[.]mlp[.]experts[.].*"),
}


@pytest.mark.parametrize("name", LISTED)
def test_the_config_says_what_is_no_longer_quantised(name, base, tmp_path):
    """As loaders read it: linear modules one by one, the experts of a block at once."""
    key, experts = LISTED[name]
    baked(base(name), tmp_path, quantized="dequantize")
    before, after = (
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (base(name), tmp_path)
    )
    listed = after.pop(key)
    for block in range(2):
        assert {f"model.layers.{block}.self_attn.o_proj", experts.format(block)} <= set(listed)
    assert "lm_head" in listed
    assert not any(name in entry for entry in listed for name in ("q_proj", "k_proj", "v_proj"))
    before.pop(key, None)
    assert after == before


def test_where_nothing_is_quantised_any_more_the_config_says_nothing(base, tmp_path):
    baked(base("mxfp4"), tmp_path, quantized="dequantize")
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_one_block_of_mxfp4_leaves_the_others_as_they_were(base, tmp_path):
    strength = {"attention": 0.0, "mlp": {0: 1.0}}
    baked(base("mxfp4"), tmp_path, strength=strength, quantized="dequantize")
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert settings["modules_to_not_convert"][-1] == "model.layers.0.mlp.experts"
    after = stored(tmp_path)
    assert after["model.layers.0.mlp.experts.gate_up_proj"].dtype == torch.bfloat16
    assert "model.layers.1.mlp.experts.gate_up_proj_blocks" in after
    assert torch.isfinite(logits(tmp_path)).all()


@pytest.mark.parametrize("way", ["keep", "dequantize"])
@pytest.mark.parametrize("name", ["mxfp4", "fp8_block experts"])
def test_chosen_experts_alone_are_edited(name, way, base, tmp_path):
    """The others are the base's, or the base's numbers; verify compares them one by one."""
    experts = {0: (1,), 1: (0, 1)}
    edits = baked(base(name), tmp_path, quantized=way, experts=experts)
    assert max(edit.leak for edit in edits) < 2e-2
    assert verify(base(name), tmp_path).faults == ()
    before, after = (run(folder).state_dict() for folder in (base(name), tmp_path))
    for block, chosen in experts.items():
        tensor = f"model.layers.{block}.mlp.experts.down_proj"
        for expert in range(before[tensor].shape[0]):
            # transformers leaves experts that lie beside FP8 in bfloat16, whatever dtype is asked
            sides = (side[tensor][expert].float() for side in (before, after))
            same = torch.allclose(*sides, rtol=2**-8, atol=0)
            assert same == (expert not in chosen)


@pytest.mark.parametrize("name", ALL)
def test_numbers_are_those_that_the_loader_itself_decodes(name, base):
    """The oracle of every layout: transformers' and compressed-tensors' own decoding."""
    folder = base(name)
    loaded = run(folder, **as_loaded(name)).state_dict()
    checkpoint, plan = planned(folder)
    seen = 0
    for edit in plan.edits:
        if not edit.layout.quantized:
            continue
        scales = edit.layout.scales_from(checkpoint.read)
        buffer = bytearray(checkpoint.read(edit.info.name))
        (matrix,) = edit.layout.matrices(buffer, edit.writer.axis, scales)
        numbers = torch.cat([matrix.decoded(*r) for r in matrix.ranges(1 << 12)], dim=1)
        module = edit.writer.module
        if name == "mxfp4":
            wanted = loaded[f"{module}.down_proj"].flatten(0, 1).T
        elif "experts" in edit.info.name:
            index = int(edit.info.name.split(".experts.")[1].split(".")[0])
            wanted = loaded[f"{module}.down_proj"][index]
        else:
            wanted = loaded[f"{module}.weight"]
        # loaders may go through bfloat16
        assert torch.allclose(numbers, wanted, rtol=2**-8, atol=0)
        seen += 1
    assert seen


def test_memory_is_that_of_the_largest_tensor(base, tmp_path):
    """Of bytes: the tensor as it was, as it will be, and its scales; panels are torch's."""
    folder = base("mxfp4")
    checkpoint, plan = planned(folder, quantized="dequantize")
    dense = plan.dequantized(checkpoint).layouts.values()
    largest = max(2 * math.prod(layout.dense.shape) for layout in dense)
    tracemalloc.start()
    bake(checkpoint, plan, basis(1), tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert largest < peak < 1.8 * largest  # with two of them at once it would be above 2


@pytest.mark.parametrize("way", ["keep", "dequantize"])
def test_the_plan_tells_what_each_way_costs_and_bake_writes_so_much(way, base, tmp_path):
    plan = make_plan(ModelSource(base("mxfp4"), "toy", None), Edit(quantized=way), tmp_path)
    (told,) = plan.summary()["quantised"]
    assert (told["format"], told["tensors"], told["way"]) == ("MXFP4", 2, way)
    assert told["keep"]["leak"] > told["dequantize"]["leak"]
    command = ["plan", str(base("mxfp4")), "--set", f"edit.quantized={way}"]
    shown = CliRunner().invoke(main, command).stdout
    assert f"2 tensors: MXFP4; {way}:" in shown
    subspace = tmp_path / "q.safetensors"
    save_file({"subspace": basis(1).float().contiguous()}, subspace)
    out = tmp_path / "out"
    edits = bake_subspace(str(base("mxfp4")), subspace, out, edit=Edit(quantized=way))
    written = Checkpoint.open(out).total_bytes
    assert written == pytest.approx(told[way]["bytes"], abs=1000)  # the header's text may differ
    edited = ("down_proj", "down_proj_blocks", "down_proj_bias", "o_proj.weight", "o_proj.bias")
    tensors = Checkpoint.open(out).tensors.values()
    assert plan.edits.edited_bytes == sum(t.nbytes for t in tensors if t.name.endswith(edited))
    (summed,) = quantized_edits(edits)
    assert summed.dequantized == (way == "dequantize")
    assert summed.max_leak == max(edit.leak for edit in edits if edit.storage)
    assert verify(base("mxfp4"), out, subspace=subspace).ok


def test_the_default_keeps_the_format(base, tmp_path):
    edits = baked(base("mxfp4"), tmp_path)
    assert not any(edit.dequantized for edit in edits)


def test_load_model_reads_what_was_unpacked(base, tmp_path):
    baked(base("fp8_block"), tmp_path, quantized="dequantize")
    tiny.train_tokenizer().save_pretrained(tmp_path)
    assert load_model(tmp_path, device="cpu", dtype="float32").model is not None
