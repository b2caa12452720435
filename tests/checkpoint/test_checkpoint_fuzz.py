"""Damaged checkpoints: each fault by name, then random damage, always a FileError.

Random damage is also held against the reference implementation: what we accept, it must accept,
with the same tensors.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from abliterator.checkpoint import DTYPE_BITS, Checkpoint, auxiliary_files, patch_file
from abliterator.errors import FileError

INDEX = "model.safetensors.index.json"
FUZZ = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def packed(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape: object, begin: object, end: object, dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = {"__metadata__": {"format": "pt"}, "a": entry([2], 0, 8), "b": entry([1, 3], 8, 20)}


def make(folder: Path, weights: bytes | None = packed(GOOD, bytes(20))) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    if weights is not None:
        (folder / "model.safetensors").write_bytes(weights)
    return folder


def make_sharded(folder: Path, index: object) -> Path:
    make(folder, None)
    (folder / "x.safetensors").write_bytes(packed(GOOD, bytes(20)))
    text = index if isinstance(index, str) else json.dumps(index)
    (folder / INDEX).write_text(text)
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(FileError) as caught:
        Checkpoint.open(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert message.isprintable()
    assert 40 < len(message) < 900
    return message


def test_the_good_ones_are_accepted(tmp_path: Path):
    assert list(Checkpoint.open(make(tmp_path / "single")).tensors) == ["a", "b"]
    index = {"weight_map": dict.fromkeys("ab", "x.safetensors")}
    assert list(Checkpoint.open(make_sharded(tmp_path / "shards", index)).tensors) == ["a", "b"]


# Folders


def test_no_folder(tmp_path: Path):
    assert "does not exist" in refused(tmp_path / "absent")
    (tmp_path / "file").touch()
    assert "is not a folder" in refused(tmp_path / "file")
    assert "no config.json" in refused(tmp_path)


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        (b"{", "not readable JSON"),
        (b"[1]", "a JSON list"),
        (b"\xff\xfe{\x00}\x00", "not readable JSON"),
        (b'{"a": 1, "a": 2}', "appears twice"),
        (b"[" * 100_000, "not readable JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not readable JSON"),
        (b'{"transformers_weights": "../other.safetensors"}', "other weights"),
    ],
)
def test_bad_config(tmp_path: Path, text: bytes, seen: str):
    (make(tmp_path) / "config.json").write_bytes(text)
    assert seen in refused(tmp_path)


def test_a_folder_that_loads_an_adapter(tmp_path: Path):
    (make(tmp_path) / "adapter_config.json").write_text("{}")
    assert "merge_and_unload" in refused(tmp_path)


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        (["pytorch_model.bin"], "save_pretrained(NEW_FOLDER)"),
        (["consolidated.00.pth", "pytorch_model.bin.index.json"], "pickle"),
        (["model-Q4_K_M.gguf"], "gguf_file="),
        (["model-00001-of-00002.safetensors"], "nothing that says it is the model"),
        ([], "Download the model again"),
    ],
)
def test_no_safetensors(tmp_path: Path, names: list[str], hint: str):
    make(tmp_path, None)
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    assert hint in refused(tmp_path)
    with pytest.raises(FileError):
        auxiliary_files(tmp_path)


def test_weights_that_are_no_file(tmp_path: Path):
    (make(tmp_path, None) / "model.safetensors").symlink_to("../../blobs/gone")
    assert "link to a file that is not there" in refused(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    assert "not a regular file" in refused(tmp_path)
    (tmp_path / "model.safetensors").rmdir()
    os.mkfifo(tmp_path / "model.safetensors")  # reading it would wait for ever
    assert "not a regular file" in refused(tmp_path)


# Indexes


@pytest.mark.parametrize(
    ("index", "seen"),
    [
        ("{", "not readable JSON"),
        ("[]", "a JSON list"),
        ({"metadata": {}}, "no weight_map"),
        ({"weight_map": {}}, "no weight_map"),
        ({"weight_map": [["a", "x.safetensors"]]}, "no weight_map"),
        ('{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}', "appears twice"),
        ({"weight_map": {"a": "x.safetensors"}}, "does not name b"),
        ({"weight_map": dict.fromkeys("abc", "x.safetensors")}, "holds c, which is not in it"),
        ({"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}, "which is in x.safetensors"),
        ({"weight_map": dict.fromkeys("ab", "gone.safetensors")}, "gone.safetensors is missing"),
        ({"weight_map": dict.fromkeys("ab", "n" * 5000 + ".safetensors")}, "not a plain path"),
        ({"weight_map": dict.fromkeys("ab", "é" * 200 + ".safetensors")}, "cannot be read"),
        ({"weight_map": dict.fromkeys("ab", "pytorch_model.bin")}, "not a safetensors file"),
        ({"weight_map": {"a": 7}}, "not a plain path"),
    ],
)
def test_bad_index(tmp_path: Path, index: object, seen: str):
    assert seen in refused(make_sharded(tmp_path, index))


OUTSIDE = [
    "../x.safetensors",
    "sub/../../x.safetensors",
    "sub/../x.safetensors",
    "/etc/x.safetensors",
    "..\\x.safetensors",
    "sub\\x.safetensors",
    "C:x.safetensors",
    "C:/x.safetensors",
    "//host/share/x.safetensors",
    "./x.safetensors",
    "sub//x.safetensors",
    "x.safetensors/",
    "..",
    "",
    "x\0.safetensors",
    "x\n.safetensors",
    "\ud800.safetensors",
]


@pytest.mark.parametrize("file", OUTSIDE, ids=ascii)
def test_an_index_cannot_lead_out_of_the_folder(tmp_path: Path, file: str):
    (tmp_path / "x.safetensors").write_bytes(packed(GOOD, bytes(20)))
    (tmp_path / "model" / "sub").mkdir(parents=True)
    make_sharded(tmp_path / "model", {"weight_map": dict.fromkeys("ab", file)})
    assert "not a plain path" in refused(tmp_path / "model")


# Headers

BIG = 2**63


@pytest.mark.parametrize(
    ("weights", "seen"),
    [
        (b"", "too few"),
        (b"\x02\0\0", "too few"),
        (packed(b"{}", length=99_999_999), "more than the file has"),
        (packed(b"{}", length=100_000_001), "are allowed"),
        (packed(b"{}", length=2**64 - 1), "are allowed"),
        (packed(b""), "does not begin with"),
        (packed(b" {}"), "does not begin with"),
        (packed(b"[]"), "does not begin with"),
        (packed(b"{}"), "no tensor"),
        (packed(b"{\xff}"), "not readable JSON"),
        (packed(b"{} x"), "not readable JSON"),
        (packed(b'{"a":' * 100_000), "not readable JSON"),
        (packed(b'{"a": 1}'), "not described by an object"),
        (packed({"__metadata__": {"n": 1}, "a": entry([2], 0, 8)}, bytes(8)), "__metadata__"),
        (packed({"__metadata__": "pt", "a": entry([2], 0, 8)}, bytes(8)), "__metadata__"),
        (packed({"a": {"shape": [], "data_offsets": [0, 0]}}), "no dtype"),
        (packed({"a": entry([2], 0, 8, dtype=16)}, bytes(8)), "no dtype"),
        (packed({"a": entry(8, 0, 8)}, bytes(8)), "not a list of sizes"),
        (packed({"a": entry([-2], 0, 8)}, bytes(8)), "not a list of sizes"),
        (packed({"a": entry([2.0], 0, 8)}, bytes(8)), "not a list of sizes"),
        (packed({"a": entry([True, 2], 0, 8)}, bytes(8)), "not a list of sizes"),
        (packed({"a": entry([2**64], 0, 8)}, bytes(8)), "not a list of sizes"),
        (packed({"a": entry([float("nan")], 0, 8)}, bytes(8)), "not a list of sizes"),
        (packed({"a": entry([BIG, BIG], 0, 8)}, bytes(8)), "larger than any file"),
        (packed({"a": entry([BIG] * 100_000, 0, 8)}, bytes(8)), "larger than any file"),
        (packed({"a": entry([3], 0, 8)}, bytes(8)), "takes 8 bytes, but 3 elements"),
        (packed({"a": entry([3], 0, 2, "F4")}, bytes(2)), "elements of F4 take 1.5"),
        (packed({"a": entry([3], 0, 1, "F4")}, bytes(1)), "elements of F4 take 1.5"),
        (packed({"a": entry([2], 8, 0)}, bytes(8)), "data_offsets"),
        (packed({"a": entry([2], -8, 0)}, bytes(8)), "data_offsets"),
        (packed({"a": entry([2], 0.0, 8)}, bytes(8)), "data_offsets"),
        (packed({"a": {"dtype": "F32", "shape": [], "data_offsets": [0]}}), "data_offsets"),
        (packed({"a": entry([2], 8, 16)}, bytes(16)), "leaves a hole"),
        (packed({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, bytes(20)), "leaves a hole"),
        (packed({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)), "overlaps"),
        (packed({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, bytes(8)), "overlaps"),
        (packed(GOOD, bytes(19)), "truncated"),
        (packed(GOOD, bytes(21)), "1 more than its tensors take"),
        (packed({"a": entry([BIG // 4], 0, BIG)}, bytes(8)), "truncated"),
        (
            packed(
                b'{"a": %s, "a": %s}' % ((json.dumps(entry([2], 0, 8)).encode(),) * 2), bytes(8)
            ),
            "the name a appears twice",
        ),
        (
            packed(
                b'{"a": {"dtype": "F32", "shape": [1], "shape": [2], "data_offsets": [0, 8]}}',
                bytes(8),
            ),
            "the name shape appears twice",
        ),
        (packed(b'{"\\ud800": %s}' % json.dumps(entry([2], 0, 8)).encode(), bytes(8)), "Unicode"),
        (packed(b'{"a\\nb": %s}' % json.dumps(entry([3], 0, 8)).encode(), bytes(8)), "'a\\nb'"),
    ],
)
def test_bad_header(tmp_path: Path, weights: bytes, seen: str):
    assert seen in refused(make(tmp_path, weights))


# Random damage


def judge(weights: bytes, folder: Path) -> None:
    """We refuse by name, or accept what the reference implementation reads the same way."""
    make(folder, weights)
    try:
        base = Checkpoint.open(folder)
    except FileError:
        return
    if all(info.dtype in DTYPE_BITS for info in base.tensors.values()):
        reference = {
            name: (found["dtype"], tuple(found["shape"]), bytes(found["data"]))
            for name, found in deserialize(weights)
        }
        assert reference == {
            name: (info.dtype, info.shape, base.read(name)) for name, info in base.tensors.items()
        }
    out = folder / "out" / "model.safetensors"
    patch_file(folder / "model.safetensors", out, base.tensors.values(), lambda *_: None)
    assert out.read_bytes() == weights


@pytest.fixture(scope="module")
def place():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


WHOLE = packed(GOOD, bytes(range(20)))


@FUZZ
@given(cut=st.integers(0, len(WHOLE) - 1))
def test_any_truncation_is_refused(place: Path, cut: int):
    refused(make(place / "truncated", WHOLE[:cut]))


@FUZZ
@given(
    flips=st.lists(
        st.tuples(st.integers(0, len(WHOLE) - 21), st.integers(1, 255)), min_size=1, max_size=4
    )
)
def test_flipped_header_bytes(place: Path, flips: list[tuple[int, int]]):
    damaged = bytearray(WHOLE)
    for at, bits in flips:
        damaged[at] ^= bits
    judge(bytes(damaged), place / "flipped")


@FUZZ
@given(data=st.binary(max_size=64), length=st.none() | st.integers(0, 2**64 - 1))
def test_any_bytes(place: Path, data: bytes, length: int | None):
    judge(packed(data, length=length), place / "any")


numbers = st.sampled_from(
    [-1, 0, 1, 2, 3, 4, 8, 12, 2**31, 2**63, 2**64 - 1, 2**64, True, 1.5, "1"]
)
sizes = st.lists(numbers, max_size=3) | st.none() | numbers
dtypes = st.sampled_from([*DTYPE_BITS, "F128", "bf16", "", None, 3])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
entries = st.fixed_dictionaries(
    {}, optional={"dtype": dtypes, "shape": sizes, "data_offsets": sizes, "more": scalars}
)
headers = st.dictionaries(
    st.text(max_size=4) | st.just("__metadata__"), entries | scalars, max_size=4
)


@FUZZ
@given(header=headers, size=st.integers(0, 24))
def test_any_json_header(place: Path, header: dict, size: int):
    judge(packed(header, bytes(size)), place / "json")


@st.composite
def almost_sound(draw: st.DrawFn) -> tuple[list[tuple[str, dict]], bytes]:
    """Tensors that fit each other, then a few offsets moved: overlaps, holes, ends outside."""
    pairs, at = [], 0
    for index in range(draw(st.integers(1, 5))):
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = [*draw(st.lists(st.integers(0, 4), max_size=2)), 8]
        nbytes = DTYPE_BITS[dtype] * 8 // 8
        for size in shape[:-1]:
            nbytes *= size
        name = draw(st.sampled_from(["a", "b", "c", f"t{index}"]))
        pairs.append((name, entry(shape, at, at + nbytes, dtype)))
        at += nbytes
    for _ in range(draw(st.integers(0, 2))):
        found = draw(st.sampled_from(pairs))[1]
        side = draw(st.sampled_from([0, 1]))
        found["data_offsets"][side] += draw(st.sampled_from([-1000, -8, -1, 1, 8, 2**40]))
    return draw(st.permutations(pairs)), bytes(max(0, at + draw(st.sampled_from([0, 0, -1, 1]))))


@FUZZ
@given(almost_sound())
def test_overlapping_and_out_of_file_offsets_and_names_given_twice(place: Path, case):
    pairs, data = case
    text = ", ".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in pairs)
    weights = packed(("{" + text + "}").encode(), data)
    judge(weights, place / "almost")
    if len({name for name, _ in pairs}) < len(pairs):
        assert "appears twice" in refused(place / "almost")
    try:
        deserialize(weights)
    except SafetensorError:
        refused(place / "almost")


shard_names = (
    st.sampled_from([*OUTSIDE, "x.safetensors", "sub/x.safetensors", "y.safetensors"])
    | st.text(max_size=12)
    | st.lists(st.sampled_from(["..", ".", "a", "/", "\\", "x.safetensors"]), max_size=5).map(
        "".join
    )
)


@FUZZ
@given(
    weight_map=st.dictionaries(st.sampled_from(["a", "b", "c"]), shard_names | scalars, max_size=3)
)
def test_any_index(place: Path, weight_map: dict):
    folder = place / "inside" / "model"
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    for outside in (place / "inside", place):  # what a path out of the folder would find
        if not (outside / "x.safetensors").exists():
            (outside / "x.safetensors").write_bytes(packed(GOOD, bytes(20)))
    make_sharded(folder, {"weight_map": weight_map})
    if weight_map == dict.fromkeys("ab", "x.safetensors"):
        assert Checkpoint.open(folder).weight_files == ("x.safetensors",)
    else:
        refused(folder)
