"""Damage to config.json and headers of checkpoints that are more than a plain Llama.

Quantised, with experts, with norms after the sublayers, and within a model that also sees: whatever
is said of them at any depth, a command is done or stops with one named error.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.cli.test_cli_fuzz import (
    WEIGHTS,
    bake,
    damaged,
    header_of,
    json_values,
    plan_and_bake,
    run,
    with_header,
)
from tests.helpers.architectures import D_MODEL, save
from tests.helpers.quantised import D_MODEL as QUANTISED_D_MODEL
from tests.helpers.quantised import save_quantised

FUZZ = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
DROP = "drop it"


@pytest.fixture(
    scope="module", params=["fp8_block", "compressed_row", "mxfp4", "gemma3", "mixtral"]
)
def place(request, tmp_path_factory):
    """A sound base of a kind, a subspace and the checkpoint baked with them."""
    where, width = tmp_path_factory.mktemp(request.param), QUANTISED_D_MODEL
    if request.param in ("fp8_block", "compressed_row", "mxfp4"):
        save_quantised(request.param, where / "base")
    else:
        save(request.param, where / "base")
        width = D_MODEL
    save_file({"subspace": torch.randn(width, 2)}, where / "q.safetensors")
    assert bake(where / "base", where / "q.safetensors", where / "baked").exit_code == 0
    return where


def paths(value: object, path: tuple = ()) -> Iterator[tuple]:
    """Of everything within a JSON value."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value[:3]):
            yield from paths(inner, (*path, index))


@FUZZ
@given(
    changes=st.lists(
        st.tuples(st.integers(0, 10**6), json_values | st.integers(-3, 40) | st.just(DROP)),
        min_size=1,
        max_size=3,
    )
)
def test_a_config_that_says_something_else_at_any_depth(place, changes):
    config = json.loads((place / "base" / "config.json").read_text())
    for which, value in changes:
        found = list(paths(config))
        *way, last = found[which % len(found)]
        holder = config
        for key in way:
            holder = holder[key]
        if value == DROP:
            del holder[last]
        else:
            holder[last] = value
    said = json.dumps(config).encode()
    plan_and_bake(place, damaged(place, "base", "config.json", said))
    run("verify", damaged(place, "baked", "config.json", said), "--base", place / "base")


@FUZZ
@given(
    changes=st.lists(
        st.tuples(
            st.integers(0, 10**6),
            st.sampled_from(["turned", "deeper", "dtype", "swapped", "renamed"]),
            st.integers(0, 10**6),
        ),
        min_size=1,
        max_size=3,
    )
)
@example(changes=[(n, "deeper", 0) for n in range(200)])
def test_headers_that_say_something_else_of_the_same_bytes(place, changes):
    header = header_of(place)
    names = sorted(header.keys() - {"__metadata__"})
    for which, how, other in changes:
        name, another = names[which % len(names)], names[other % len(names)]
        if name not in header or another not in header:
            continue  # renamed before
        told = header[name]
        if how == "turned":
            told["shape"].reverse()
        elif how == "deeper":
            told["shape"].insert(0, 1)
        elif how == "dtype":
            same_size = {"F32": "I32", "BF16": "F16", "U8": "F8_E4M3", "F8_E4M3": "U8"}
            told["dtype"] = same_size.get(told["dtype"], told["dtype"])
        elif how == "swapped":
            header[name], header[another] = header[another], told
        else:
            header[f"other.{name}"] = header.pop(name)
    text = json.dumps(header).encode()
    plan_and_bake(place, damaged(place, "base", WEIGHTS, with_header(place, text)))


@pytest.mark.parametrize("shape", [[1, D_MODEL], [D_MODEL, 1]])
def test_gains_of_another_shape_are_named(shape, tmp_path):
    save("gemma2", tmp_path / "base")
    path = tmp_path / "base" / WEIGHTS
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    gain = header["model.layers.1.post_attention_layernorm.weight"]
    gain["shape"] = shape
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    done = run("plan", tmp_path / "base")
    assert done.exit_code == 1
    assert f"post_attention_layernorm.weight has shape {shape}" in done.stderr


def test_a_text_config_of_no_type(tmp_path):
    config = tmp_path / "base" / "config.json"
    save("gemma3", tmp_path / "base")
    told = json.loads(config.read_text())
    told["text_config"]["model_type"] = []
    config.write_text(json.dumps(told))
    done = run("plan", tmp_path / "base")
    assert done.exit_code == 1
    assert "No architecture of type '[]'" in done.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda told: told.update(ignore=0), "quantization_config.ignore: 0, expected a list"),
        (
            lambda told: told["config_groups"]["group_0"]["weights"].update(num_bits=[]),
            "quantised by compressed-tensors",
        ),
    ],
)
def test_quantisation_settings_of_another_type(change, said, tmp_path):
    save_quantised("compressed_row", tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    told = json.loads(config.read_text())
    change(told["quantization_config"])
    config.write_text(json.dumps(told))
    options = ("--set", "edit.quantized=dequantize", "--set", "edit.strength={mlp: 1}")
    done = run("plan", tmp_path / "base", *options)
    assert done.exit_code == 1
    assert said in done.stderr
