"""The byte contract: sound checkpoints pass, and every kind of damage is named."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, Olmo2Config

from abliterator import pipeline
from abliterator.checkpoint import Checkpoint
from abliterator.cli import main
from abliterator.errors import CheckpointError
from abliterator.recipe import load_recipe
from abliterator.verification import EDITS, verify
from tests.helpers import tiny

FAMILIES = ("llama", "llama_biased", "llama_tied", "gemma", "phi3", "smollm3")
WRITER = "model.layers.1.mlp.down_proj.weight"
READER = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def baked(tmp_path, tiny_folder):
    """`baked(family, **options)`: (base, checkpoint, subspace file)."""

    def make(family: str = "llama", **options: object) -> tuple[Path, Path, Path]:
        base = tiny_folder(family, **options)
        subspace = tmp_path / "q.safetensors"
        save_file({"subspace": torch.linalg.qr(torch.randn(32, 2)).Q.contiguous()}, subspace)
        checkpoint = tmp_path / f"{family}-edited"
        pipeline.bake_subspace(str(base), subspace, checkpoint)
        return base, checkpoint, subspace

    return make


def flip(checkpoint: Path, name: str) -> None:
    """Turns over the lowest bit of one stored byte of a tensor."""
    info = Checkpoint.open(checkpoint).tensors[name]
    with (checkpoint / info.file).open("r+b") as stream:
        stream.seek(info.start + info.nbytes // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_bake_wrote_passes(baked, family, dtype):
    base, checkpoint, subspace = baked(family, dtype=dtype)
    found = verify(base, checkpoint, subspace=subspace)
    assert found.faults == ()
    assert found.ok
    edits = json.loads((checkpoint / EDITS).read_text())
    assert found.edited == len(edits) > 0
    leaks = [edit["leak"] for edit in edits if edit["leak"] is not None]
    assert found.max_leak == pytest.approx(max(leaks), rel=0.05, abs=1e-6)
    assert found.foreign == ()
    changed = ("README.md", "config.json")
    every_byte = sum(p.stat().st_size for p in base.iterdir() if p.name not in changed)
    assert found.identical_bytes + found.edited_bytes == every_byte


@pytest.mark.parametrize("is_sound", [True, False])
def test_files_compared_in_threads_have_the_findings_of_one(baked, monkeypatch, is_sound):
    base, checkpoint, subspace = baked(shard_size="30KB")
    if not is_sound:
        flip(checkpoint, WRITER)
        flip(checkpoint, READER)
    expected, sizes = verify(base, checkpoint, subspace=subspace), []
    monkeypatch.setattr("abliterator.verification._compare._workers", lambda *_: 3)
    assert verify(base, checkpoint, subspace=subspace, on_bytes=sizes.append) == expected
    assert expected.ok is is_sound
    assert len(sizes) > 2


def test_edits_written_by_an_earlier_version_pass(baked):
    """Its name for `dequantized` was `unpacked`."""
    base, checkpoint, subspace = baked()
    path = checkpoint / EDITS
    earlier = path.read_text().replace('"dequantized":', '"unpacked":')
    assert earlier != path.read_text()
    path.write_text(earlier)
    assert verify(base, checkpoint, subspace=subspace).ok


def test_shards_pass_and_are_compared_one_by_one(baked):
    base, checkpoint, subspace = baked("llama", shard_size="30KB")
    sizes = []
    found = verify(base, checkpoint, subspace=subspace, on_bytes=sizes.append)
    assert found.ok
    assert sizes == list(Checkpoint.open(base).file_bytes.values())
    assert len(sizes) > 1


def test_one_bit_of_a_tensor_that_was_not_edited(baked):
    base, checkpoint, subspace = baked()
    flip(checkpoint, READER)
    found = verify(base, checkpoint, subspace=subspace)
    assert [READER in fault for fault in found.faults] == [True]
    assert not found.ok


def test_one_bit_in_a_later_chunk_of_a_large_tensor(tiny_folder, tmp_path):
    """Tensors are compared 4 MiB at a time; this one has 5 and a bit."""
    base = Path(shutil.copytree(tiny_folder("llama"), tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.randn(45_001, 32)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    save_file({"subspace": torch.linalg.qr(torch.randn(32, 2)).Q.contiguous()}, tmp_path / "q")
    checkpoint = tmp_path / "edited"
    pipeline.bake_subspace(str(base), tmp_path / "q", checkpoint)
    assert verify(base, checkpoint).ok
    info = Checkpoint.open(checkpoint).tensors["model.embed_tokens.weight"]
    with (checkpoint / info.file).open("r+b") as stream:
        stream.seek(info.end - 1)
        byte = stream.read(1)[0]
        stream.seek(info.end - 1)
        stream.write(bytes([byte ^ 1]))
    assert ["embed_tokens" in fault for fault in verify(base, checkpoint).faults] == [True]


def test_one_bit_of_a_tensor_that_was_edited(baked):
    base, checkpoint, _ = baked()
    flip(checkpoint, WRITER)
    (fault,) = verify(base, checkpoint).faults
    assert "edited bytes of " + WRITER in fault


def test_one_bit_of_the_base(baked, tmp_path):
    """An edited tensor is known by both hashes, so another base cannot stand in."""
    base, checkpoint, _ = baked()
    other = Path(shutil.copytree(base, tmp_path / "other"))
    flip(other, WRITER)
    (fault,) = verify(other, checkpoint).faults
    assert "base bytes of " + WRITER in fault


def test_an_edit_that_is_not_written_down(baked):
    base, checkpoint, _ = baked()
    path = checkpoint / EDITS
    path.write_text(json.dumps([e for e in json.loads(path.read_text()) if e["name"] != WRITER]))
    (fault,) = verify(base, checkpoint).faults
    assert WRITER in fault
    assert "does not name it" in fault


def test_a_header_that_says_something_else(baked):
    base, checkpoint, _ = baked()
    path = checkpoint / "model.safetensors"
    data = path.read_bytes()
    changed = data.replace(b'"format":"pt"', b'"format":"tp"', 1)
    assert changed != data
    path.write_bytes(changed)
    (fault,) = verify(base, checkpoint).faults
    assert "header" in fault


def test_a_subspace_that_was_not_removed(baked, tmp_path):
    base, checkpoint, _ = baked()
    other = tmp_path / "other.safetensors"
    save_file({"subspace": torch.linalg.qr(torch.randn(32, 2)).Q.contiguous()}, other)
    found = verify(base, checkpoint, subspace=other)
    assert len(found.faults) == found.edited
    assert all("measured again" in fault for fault in found.faults)
    assert found.max_leak > 0.5


def test_a_leak_that_was_made_to_look_smaller(baked):
    base, checkpoint, subspace = baked(dtype=torch.bfloat16)
    edits = json.loads((checkpoint / EDITS).read_text())
    weights = load_file(checkpoint / "model.safetensors")
    weights[WRITER] = load_file(base / "model.safetensors")[WRITER]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    for edit in edits:
        if edit["name"] == WRITER:
            edit["sha256_after"] = edit["sha256_before"]
    (checkpoint / EDITS).write_text(json.dumps(edits))
    found = verify(base, checkpoint, subspace=subspace)
    assert [WRITER in fault and "1.00e+00" in fault for fault in found.faults] == [True]
    assert verify(base, checkpoint).ok  # without a subspace nobody can tell


def changed_config(base: Path, change: str) -> str:
    """A config.json of `base` that abliterator would not have written."""
    document = json.loads((base / "config.json").read_text())
    if change == "the base's own":
        return json.dumps(document, indent=2) + "\n"
    entry: dict[str, object] = {"version": "0.1.0", "subspace_sha256": "a" * 64}
    if change == "a number":
        document["rms_norm_eps"] = 1e-5
    elif change == "another key":
        document["note"] = "x"
    elif change == "a key less":
        document.pop("rms_norm_eps")
    elif change == "a false origin":
        document["_name_or_path"] = "somebody/else"
    else:
        entry |= {
            "free text in the entry": {"note": "x"},
            "no digest": {"subspace_sha256": "<script>"},
            "no version": {"version": "a b"},
            "a list": {"version": ["0.1.0"]},
            "two digests in one": {"recipe_digest": ["a" * 64]},
        }[change]
    return json.dumps({**document, "abliterator": entry}, indent=2) + "\n"


@pytest.mark.parametrize(
    "change",
    [
        *("the base's own", "a number", "another key", "a key less", "a false origin"),
        *("free text in the entry", "no digest", "no version", "a list", "two digests in one"),
    ],
)
def test_one_config_is_allowed(baked, change):
    base, checkpoint, _ = baked()
    assert "rms_norm_eps" in (checkpoint / "config.json").read_text()
    (checkpoint / "config.json").write_text(changed_config(base, change))
    (fault,) = verify(base, checkpoint).faults
    assert fault.startswith("config.json ")


def test_a_config_names_the_subspace_where_there_was_no_recipe(baked):
    _, checkpoint, subspace = baked()
    entry = json.loads((checkpoint / "config.json").read_text())["abliterator"]
    assert entry["subspace_sha256"] == hashlib.sha256(subspace.read_bytes()).hexdigest()


@pytest.mark.parametrize("damage", ["missing", "short", "config", "tokenizer"])
def test_files_that_are_not_the_bases(baked, damage):
    base, checkpoint, _ = baked()
    name = {"config": "config.json", "tokenizer": "tokenizer.json"}.get(damage, "model.safetensors")
    path = checkpoint / name
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.write_text(path.read_text() + "\n")
    (fault,) = verify(base, checkpoint).faults
    assert name in fault


def test_files_that_nobody_put_there_are_named_and_are_no_fault(baked):
    base, checkpoint, _ = baked()
    (checkpoint / "notes").mkdir()
    (checkpoint / "notes" / "rollouts.jsonl").write_text("private")
    (checkpoint / ".DS_Store").write_text("")
    (checkpoint / "elsewhere").symlink_to(base)
    found = verify(base, checkpoint)
    assert found.ok
    assert found.foreign == (".DS_Store", "elsewhere", "notes/rollouts.jsonl")
    assert not set(found.foreign) & set(found.sha256)


@pytest.mark.parametrize("field", ["shape", "dtype", "file", "name", "twice"])
def test_edits_that_do_not_fit_the_base(baked, field):
    base, checkpoint, _ = baked()
    path = checkpoint / EDITS
    edits = json.loads(path.read_text())
    if field == "twice":
        edits.append(edits[0])
    else:
        wrong = {"shape": [1, 2], "dtype": "F16", "file": "other.safetensors", "name": "nothing"}
        edits[0][field] = wrong[field]
    path.write_text(json.dumps(edits))
    assert any(EDITS in fault for fault in verify(base, checkpoint).faults)


@pytest.mark.parametrize("text", [None, "{", "[1]", '[{"name": "x"}]', "7"])
def test_a_folder_without_readable_edits(baked, text):
    base, checkpoint, _ = baked()
    (checkpoint / EDITS).unlink()
    if text is not None:
        (checkpoint / EDITS).write_text(text)
    with pytest.raises(CheckpointError, match=r"abliterator/edits\.json"):
        verify(base, checkpoint)


def test_a_subspace_of_another_model(baked, tmp_path):
    base, checkpoint, _ = baked()
    wide = tmp_path / "wide.safetensors"
    save_file({"subspace": torch.linalg.qr(torch.randn(64, 1)).Q.contiguous()}, wide)
    with pytest.raises(CheckpointError, match="64 dimensions"):
        verify(base, checkpoint, subspace=wide)


@pytest.mark.parametrize("config", [Gemma2Config, Olmo2Config])
def test_the_gains_of_norms_after_a_writer_count(config, tmp_path, tiny_tokenizer, monkeypatch):
    """The leak is that of what reaches the stream, not of the matrix alone."""
    name = config.model_type
    monkeypatch.setitem(tiny.CONFIGS, name, lambda: config(**tiny._SIZES))
    base = tiny.save_tiny(name, tmp_path / "base", tiny_tokenizer)
    subspace = tmp_path / "q.safetensors"
    save_file({"subspace": torch.linalg.qr(torch.randn(32, 2)).Q.contiguous()}, subspace)
    pipeline.bake_subspace(str(base), subspace, tmp_path / "edited")
    found = verify(base, tmp_path / "edited", subspace=subspace)
    assert found.faults == ()
    assert 0 <= found.max_leak < 1e-5


# ---- the command


def test_the_command_proves_a_checkpoint_alone(baked):
    base, checkpoint, _ = baked()
    (checkpoint / "notes.txt").write_text("x")
    done = CliRunner().invoke(main, ["verify", str(checkpoint), "--base", str(base)])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"{checkpoint}: verified\n")
    assert "edited     6 tensors" in done.stdout
    assert "leak not measured again" in done.stdout
    assert "not ours   notes.txt" in done.stdout


def test_the_command_fails_where_the_proof_does(baked):
    base, checkpoint, _ = baked()
    flip(checkpoint, READER)
    done = CliRunner().invoke(main, ["verify", str(checkpoint), "--base", str(base)])
    assert done.exit_code == 1
    assert "NOT its base" in done.stdout
    told = CliRunner().invoke(main, ["verify", str(checkpoint), "--base", str(base), "--json"])
    assert told.exit_code == 1
    found = json.loads(told.stdout)
    assert found["ok"] is False
    assert READER in found["faults"][0]


def test_the_command_asks_for_a_base_that_nobody_names(baked, tmp_path):
    _, checkpoint, _ = baked()
    assert "--base" in CliRunner().invoke(main, ["verify", str(checkpoint)]).stderr
    assert "neither" in CliRunner().invoke(main, ["verify", str(tmp_path)]).stderr


def test_the_command_knows_the_base_and_the_subspace_of_a_build(tmp_path, tiny_folder):
    for name, question in (("target", "Tell me about"), ("neutral", "Name")):
        things = ("river", "bridge", "wall", "market", "square", "port", "gate")
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{question} the {x}." for x in things))
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        f"model: {tiny_folder('qwen3', dtype=torch.bfloat16)}\nlayers: [2]\nk: 1\n"
        "prompts: {target: {path: target.txt}, neutral: {path: neutral.txt}}\n"
        "rollouts: {max_new_tokens: 8}\n"
    )
    out = tmp_path / "out"
    options = pipeline.Options(device="cpu", dtype="float32")
    pipeline.run_stages(load_recipe(recipe), out, until="bake", options=options)
    done = CliRunner().invoke(main, ["verify", str(out), "--json"])
    assert done.exit_code == 0, done.output
    assert 0 <= json.loads(done.stdout)["max_leak"] < 1e-2
