"""Random damage through the command line: an error with a name, no traceback, nothing written."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from abliterator.cli import main
from abliterator.verification import EDITS
from tests.helpers.tiny import D_MODEL

FUZZ = settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
WEIGHTS = "model.safetensors"


def run(*arguments: object) -> Result:
    """The command: done, or one named error; never anything else."""
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code in (0, 1), done.output
    assert "Traceback" not in done.output + done.stderr
    return done


@pytest.fixture(scope="module")
def place(tiny_folder, tmp_path_factory):
    """A sound base, a subspace and the checkpoint baked with them, to copy and damage."""
    where = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(tiny_folder("llama", dtype=torch.bfloat16), where / "base")
    save_file({"subspace": torch.randn(D_MODEL, 2)}, where / "q.safetensors")
    assert bake(where / "base", where / "q.safetensors", where / "baked").exit_code == 0
    return where


def bake(model: Path, subspace: Path, out: Path) -> Result:
    return run("bake", "--model", model, "--subspace", subspace, "--out", out)


def damaged(place: Path, of: str, file: str, data: bytes) -> Path:
    """A fresh copy of a folder with other bytes in one of its files."""
    folder = place / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place / of, folder)
    (folder / file).write_bytes(data)
    return folder


def plan_and_bake(place: Path, folder: Path) -> Result:
    """Both commands on one model: what a plan refuses is not baked, and leaves no folder."""
    planned = run("plan", folder)
    out = place / "out"
    shutil.rmtree(out, ignore_errors=True)
    made = bake(folder, place / "q.safetensors", out)
    if planned.exit_code == 1:
        assert made.exit_code == 1
        assert planned.stderr.count("\n") == 1  # one paragraph
    if made.exit_code == 1:
        assert not out.exists()
    return made


def header_size(data: bytes) -> int:
    return struct.unpack("<Q", data[:8])[0]


def header_of(place: Path) -> dict[str, dict]:
    data = (place / "base" / WEIGHTS).read_bytes()
    return json.loads(data[8 : 8 + header_size(data)])


def with_header(place: Path, text: bytes, *, length: int | None = None) -> bytes:
    data = (place / "base" / WEIGHTS).read_bytes()
    size = len(text) if length is None else length
    return struct.pack("<Q", size) + text + data[8 + header_size(data) :]


@FUZZ
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncation(place: Path, share: float):
    data = (place / "base" / WEIGHTS).read_bytes()
    cut = data[: int(share * len(data))]
    assert plan_and_bake(place, damaged(place, "base", WEIGHTS, cut)).exit_code == 1
    if len(cut) > 8:  # whatever the length says, the same of an edited file
        edited = damaged(place, "baked", WEIGHTS, cut)
        assert run("verify", edited, "--base", place / "base").exit_code == 1


@FUZZ
@given(
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1)
)
def test_flipped_header_bytes(place: Path, flips: list[tuple[float, int]]):
    data = bytearray((place / "base" / WEIGHTS).read_bytes())
    before = bytes(data)
    end = 8 + header_size(before)
    for where, bits in flips:
        data[int(where * end)] ^= bits
    folder = damaged(place, "base", WEIGHTS, bytes(data))
    made = plan_and_bake(place, folder)
    if made.exit_code == 0:  # a name in __metadata__, say: then it is carried as it is
        assert (place / "out" / WEIGHTS).read_bytes()[:end] == data[:end]
    if bytes(data) != before:
        edited = bytearray((place / "baked" / WEIGHTS).read_bytes())
        edited[:end] = data[:end]
        folder = damaged(place, "baked", WEIGHTS, bytes(edited))
        assert run("verify", folder, "--base", place / "base").exit_code == 1


@FUZZ
@given(
    moves=st.lists(
        st.tuples(st.integers(0, 10**6), st.sampled_from([0, 1]), st.integers(-(2**40), 2**63)),
        min_size=1,
        max_size=3,
    )
)
def test_offsets_that_overlap_or_leave_the_file(place: Path, moves: list[tuple[int, int, int]]):
    header = header_of(place)
    names = sorted(header.keys() - {"__metadata__"})
    for which, side, by in moves:
        header[names[which % len(names)]]["data_offsets"][side] += by
    if header == header_of(place):
        return
    folder = damaged(place, "base", WEIGHTS, with_header(place, json.dumps(header).encode()))
    assert plan_and_bake(place, folder).exit_code == 1


@FUZZ
@given(which=st.integers(0, 10**6), length=st.sampled_from([0, 1, 2**20, 10**8, 10**8 + 1, 2**63]))
def test_duplicate_names_and_huge_headers(place: Path, which: int, length: int):
    header = header_of(place)
    name = sorted(header.keys() - {"__metadata__"})[which % (len(header) - 1)]
    again = f", {json.dumps(name)}: {json.dumps(header[name])}}}"
    twice = json.dumps(header)[:-1] + again
    folder = damaged(place, "base", WEIGHTS, with_header(place, twice.encode()))
    made = plan_and_bake(place, folder)
    assert made.exit_code == 1
    assert "appears twice" in made.stderr
    text = json.dumps(header).encode()
    folder = damaged(place, "base", WEIGHTS, with_header(place, text, length=length))
    assert plan_and_bake(place, folder).exit_code == 1


@FUZZ
@given(name=st.text(max_size=9) | st.sampled_from(["..", "../x", "/etc/passwd", "model..weight"]))
def test_names_that_nobody_knows(place: Path, name: str):
    header = header_of(place)
    first = min(header.keys() - {"__metadata__"})
    renamed = {name if key == first else key: value for key, value in header.items()}
    folder = damaged(place, "base", WEIGHTS, with_header(place, json.dumps(renamed).encode()))
    assert plan_and_bake(place, folder).exit_code == 1


@FUZZ
@given(
    key=st.sampled_from(
        [
            *("model_type", "hidden_size", "num_hidden_layers", "tie_word_embeddings"),
            *("num_local_experts", "num_nextn_predict_layers", "quantization_config"),
        ]
    ),
    value=st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.lists(st.integers(), max_size=2),
)
@example(key="num_hidden_layers", value=10**18)
@example(key="num_nextn_predict_layers", value=10**18)
@example(key="num_nextn_predict_layers", value="two")
def test_a_config_that_says_something_else(place: Path, key: str, value: object):
    config = json.loads((place / "base" / "config.json").read_text())
    config[key] = value
    plan_and_bake(place, damaged(place, "base", "config.json", json.dumps(config).encode()))


@FUZZ
@given(data=st.binary(max_size=80))
def test_a_subspace_that_is_none(place: Path, data: bytes):
    (place / "bad.safetensors").write_bytes(data)
    made = bake(place / "base", place / "bad.safetensors", place / "none")
    assert made.exit_code == 1
    assert not (place / "none").exists()
    verified = run(
        "verify", place / "baked", "--base", place / "base", "--subspace", place / "bad.safetensors"
    )
    assert verified.exit_code == 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@FUZZ
@given(which=st.integers(0, 50), key=st.integers(0, 50), value=json_values)
def test_edits_that_say_something_else(place: Path, which: int, key: int, value: object):
    edits = json.loads((place / "baked" / EDITS).read_text())
    entry = edits[which % len(edits)]
    named = sorted(entry)[key % len(entry)]
    entry[named] = value
    folder = damaged(place, "baked", EDITS, json.dumps(edits).encode())
    run("verify", folder, "--base", place / "base", "--subspace", place / "q.safetensors")
    folder = damaged(place, "baked", EDITS, json.dumps(value).encode())
    assert run("verify", folder, "--base", place / "base").exit_code == 1
