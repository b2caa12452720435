"""Packed numbers against what the formats' own tools read, and against parts that do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import pytest
import torch

from abliterator.errors import CheckpointError, UnsupportedModel
from abliterator.formats import storage_of
from tests.helpers.packed import PACKED, reference

MODULE = "model.layers.0.mlp.down_proj"
DTYPES = {
    torch.int32: "I32",
    torch.int64: "I64",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
}
ROWS, COLUMNS = 64, 256
MAIN = ("weight_packed", "qweight", "weight")


class Header(NamedTuple):
    dtype: str
    shape: tuple[int, ...]


def matrix(seed=0, shape=(ROWS, COLUMNS)):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def stored(name, **changed):
    """Tensors of one matrix by the ends of their names; `changed` ones are replaced, or gone."""
    parts = {**PACKED[name].quantise(matrix()), **changed}
    return {end: part.contiguous() for end, part in parts.items() if part is not None}


def layout_of(parts: Mapping[str, torch.Tensor], settings: dict):
    headers = {
        f"{MODULE}.{end}": Header(DTYPES[part.dtype], tuple(part.shape))
        for end, part in parts.items()
    }
    main = next(end for end in MAIN if end in parts)
    return storage_of({"quantization_config": settings}).layout(f"{MODULE}.{main}", headers)


def data(part):
    return part.reshape(-1).view(torch.uint8).numpy().tobytes()


def opened(parts, settings):
    """The layout, the buffer, and the stored matrix."""
    layout = layout_of(parts, settings)
    scales = layout.scales_from(lambda name: data(parts[name.rpartition(".")[2]]))
    buffer = bytearray(data(parts[layout.name.rpartition(".")[2]]))
    (found,) = layout.matrices(buffer, 0, scales)
    return layout, buffer, found


def decoded(found):
    return torch.cat([found.decoded(*r) for r in found.ranges(1 << 10)], dim=1)


@pytest.mark.parametrize("name", PACKED)
def test_numbers_are_those_that_its_own_tools_read(name):
    parts = stored(name)
    layout, _, found = opened(parts, PACKED[name].settings)
    assert layout.plain_shape == found.shape == (ROWS, COLUMNS)
    assert layout.dense.name == f"{MODULE}.weight"
    assert torch.allclose(decoded(found), reference(name, parts), rtol=1e-6, atol=0)
    off = float((decoded(found) - matrix()).norm() / matrix().norm())
    assert off < (0.01 if "8" in name or name == "gptq_v2" else 0.13)
    assert layout.fault(layout.scales_from(lambda n: data(parts[n.rpartition(".")[2]]))) is None


@pytest.mark.parametrize("name", PACKED)
def test_what_is_put_is_what_is_read_and_nothing_else_moves(name):
    _, buffer, found = opened(stored(name), PACKED[name].settings)
    before = bytes(buffer)
    for start, stop in found.ranges(1 << 10):
        numbers, units = found.get(start, stop)
        # numbers are fixed points of rounding, and rows can be put alone
        assert torch.equal(found.rounded(units.numbers(units.weights_(numbers.clone()))), numbers)
        found.put(start, numbers)
        found.put(start, numbers[[5, 2]], torch.tensor([5, 2]))
    assert bytes(buffer) == before
    numbers, units = found.get(32, 96)
    largest = found.rounded(torch.full_like(numbers, 1e9))
    wanted = decoded(found)
    wanted[:, 32:96] = units.weights_(largest.clone())
    found.put(32, largest)
    assert torch.equal(decoded(found), wanted)
    assert bytes(buffer) != before


def test_the_two_layouts_of_nvfp4_hold_the_same_numbers():
    """One divides by the number that the other multiplies by."""
    theirs, ours = (
        decoded(opened(stored(name), PACKED[name].settings)[2]) for name in ("nvfp4", "modelopt")
    )
    assert torch.allclose(theirs, ours, rtol=1e-5)
    whole = stored("nvfp4")["weight_global_scale"] * stored("modelopt")["weight_scale_2"]
    assert float(whole) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["int4_group", "nvfp4", "awq"])
def test_a_group_whose_scale_is_0_is_0(name):
    ends = ("scales",) if name == "awq" else ("weight_scale",)
    parts = stored(name)
    for end in ends:
        parts[end] = parts[end].clone()
        parts[end][0] = torch.zeros_like(parts[end][0])
    _, _, found = opened(parts, PACKED[name].settings)
    numbers, units = found.get(0, 64)
    again = found.rounded(units.numbers(units.weights_(numbers)))
    assert torch.isfinite(again).all()
    assert torch.isfinite(units.weights_(again)).all()


def test_columns_go_to_the_groups_of_an_order_that_was_stored():
    """As older compressed-tensors stored them; a tensor of -1 says that there is none."""
    settings = PACKED["int4_group"].settings
    order = (torch.arange(COLUMNS) % 2).int()
    parts = stored("int4_group", weight_g_idx=order)
    numbers = opened(stored("int4_group"), settings)[2].get(0, COLUMNS)[0]
    wanted = numbers * parts["weight_scale"].float()[:, order.long()]
    assert torch.equal(decoded(opened(parts, settings)[2]), wanted)
    none = stored("int4_group", weight_g_idx=torch.full((COLUMNS,), -1, dtype=torch.int32))
    plain = decoded(opened(stored("int4_group"), settings)[2])
    assert torch.equal(decoded(opened(none, settings)[2]), plain)


def changed_group(name, **weights):
    settings = PACKED[name].settings
    group = settings["config_groups"]["group_0"]
    changed = {**group, "weights": {**group["weights"], **weights}}
    return {**settings, "config_groups": {"group_0": changed}}


def settings_of(name, **changed):
    return {**PACKED[name].settings, **changed}


WORDS = torch.zeros(3, 3, dtype=torch.int32)
HALF = torch.zeros(3, 3, dtype=torch.float16)
DISAGREE = {
    "a wrong group size": ("int4_group", {}, changed_group("int4_group", group_size=64)),
    "a group size that is none": ("int4_group", {}, changed_group("int4_group", group_size="128")),
    "another number of bits": ("int4_group", {}, changed_group("int4_group", num_bits=8)),
    "truncated scales": ("int4_group", {"weight_scale": HALF}, None),
    "scales that are integers": ("int8_row", {"weight_scale": WORDS}, None),
    "no scales": ("int4_row", {"weight_scale": None}, None),
    "a module that is not quantised": ("int4_row", {}, settings_of("int4_row", ignore=[MODULE])),
    "no group for the module": (
        "int4_row",
        {},
        {
            **PACKED["int4_row"].settings,
            "config_groups": {
                "a": {
                    **PACKED["int4_row"].settings["config_groups"]["group_0"],
                    "targets": ["re:.*attn.*"],
                }
            },
        },
    ),
    "zero points of what is symmetric": ("int4_group", {"weight_zero_point": WORDS}, None),
    "no zero points": ("int4_zeros", {"weight_zero_point": None}, None),
    "truncated zero points": ("int4_zeros", {"weight_zero_point": WORDS}, None),
    "NVFP4 called integers": ("nvfp4", {}, PACKED["int4_group"].settings),
    "integers called NVFP4": ("int4_group", {}, PACKED["nvfp4"].settings),
    "NVFP4 without its one number": ("nvfp4", {"weight_global_scale": None}, None),
    "NVFP4 with a number a row": ("modelopt", {"weight_scale_2": torch.ones(ROWS)}, None),
    "NVFP4 with truncated scales": (
        "modelopt",
        {"weight_scale": torch.zeros(ROWS, 15).to(torch.float8_e4m3fn)},
        None,
    ),
    "GPTQ with a wrong group size": ("gptq", {}, settings_of("gptq", group_size=32)),
    "GPTQ of other bits": ("gptq", {}, settings_of("gptq", bits=8)),
    "GPTQ with truncated zero points": ("gptq", {"qzeros": WORDS}, None),
    "GPTQ without zero points": ("gptq", {"qzeros": None}, None),
    "GPTQ with a truncated order": ("gptq", {"g_idx": WORDS[0]}, None),
    "GPTQ of a module that `dynamic` leaves out": (
        "gptq",
        {},
        settings_of("gptq", dynamic={"-:.*down_proj": {}}),
    ),
    "AWQ with an order": ("awq", {"g_idx": torch.zeros(COLUMNS, dtype=torch.int32)}, None),
    "AWQ called GPTQ": ("awq", {}, settings_of("gptq", group_size=64)),
    "GPTQ called AWQ": ("gptq", {}, settings_of("awq", group_size=128)),
    "integers of 3 bits": ("gptq", {}, settings_of("gptq", bits=3)),
    "bits that are no number": ("awq", {}, settings_of("awq", bits="4")),
}


@pytest.mark.parametrize("case", DISAGREE)
def test_a_config_that_disagrees_with_the_tensors_is_named(case):
    name, changed, settings = DISAGREE[case]
    with pytest.raises(UnsupportedModel, match=r"down_proj\.\w+ .*(expected|was made from)"):
        layout_of(stored(name, **changed), settings or PACKED[name].settings)


def test_a_rule_of_dynamic_changes_the_bits_of_its_modules():
    parts = PACKED["gptq_v2"].quantise(matrix())
    settings = settings_of("gptq", checkpoint_format="gptq_v2")
    dynamic = {"+:.*down.*": {"bits": 8, "group_size": -1}, "-:.*": {}}
    layout, _, found = opened(parts, {**settings, "dynamic": dynamic})
    assert layout.bits == 8
    assert torch.equal(decoded(found), decoded(opened(parts, PACKED["gptq_v2"].settings)[2]))


NAN = torch.tensor(float("nan"))
UNSOUND = {
    "a scale that is NaN": ("int4_group", {"weight_scale": NAN.bfloat16().expand(ROWS, 2)}, "NaN"),
    "one number that is 0": ("nvfp4", {"weight_global_scale": torch.zeros(1)}, "not above 0"),
    "one number that is infinite": (
        "modelopt",
        {"weight_scale_2": 1 / torch.zeros(())},
        "infinite",
    ),
    "another shape": ("int4_row", {"weight_shape": torch.tensor([ROWS, 250])}, "250"),
    "groups out of range": ("gptq", {"g_idx": torch.arange(COLUMNS).int()}, "outside of 0 to 1"),
    "zero points out of range": (
        "gptq",  # its tools add 1, and 16 is no number of 4 bits
        {"qzeros": torch.full((2, ROWS // 8), -1, dtype=torch.int32)},
        "outside of the 16",
    ),
}


@pytest.mark.parametrize("case", UNSOUND)
def test_parts_that_cannot_be_right_are_named(case):
    name, changed, fault = UNSOUND[case]
    parts = stored(name, **changed)
    layout = layout_of(parts, PACKED[name].settings)
    found = layout.fault(layout.scales_from(lambda n: data(parts[n.rpartition(".")[2]])))
    assert fault in found
    assert MODULE in found


@pytest.mark.parametrize("columns", [100, 97])
def test_rows_that_do_not_fill_their_words_are_seen(columns):
    """Their length is in no header: only what `weight_shape` holds says it."""
    parts = PACKED["int4_row"].quantise(matrix(shape=(ROWS, columns)))
    layout = layout_of(parts, PACKED["int4_row"].settings)
    fault = layout.fault(layout.scales_from(lambda n: data(parts[n.rpartition(".")[2]])))
    assert f"[{ROWS}, {columns}]" in fault


@pytest.mark.parametrize(
    "changed",
    [
        {"checkpoint_format": "marlin"},
        {"checkpoint_format": "bitblas"},
        {"is_marlin_format": True},
    ],
)
def test_layouts_for_one_kernel_are_refused(changed):
    with pytest.raises(UnsupportedModel, match="quantised by gptq"):
        storage_of({"quantization_config": settings_of("gptq", **changed)})
    with pytest.raises(UnsupportedModel, match="quantised by awq"):
        storage_of({"quantization_config": settings_of("awq", version="gemv")})


@pytest.mark.parametrize("key", ["ignore", "exclude_modules"])
def test_modelopts_list_may_be_inside(key):
    inner = {"quant_algo": "NVFP4", key: 3}
    settings = {"quant_method": "modelopt", "quantization": inner}
    with pytest.raises(CheckpointError, match="expected a list"):
        storage_of({"quantization_config": settings})
