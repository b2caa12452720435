"""Which files go along with the weights, and the fingerprint of all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from pathlib import Path

import pytest

from abliterator.checkpoint import Checkpoint, auxiliary_files, fingerprint
from abliterator.errors import CheckpointError
from abliterator.files import (
    FileHashes,
)

# Which files go along

CARRIED = """
LICENSE Notice.txt USE_POLICY.md MODEL_LICENSE "Some LICENSE AGREEMENT" COPYING
added_tokens.json chat_template.jinja chat_template.json generation_config.json merges.txt
modeling_some.py kernel.cu preprocessor_config.json processor_config.json some.tiktoken
special_tokens_map.json spiece.model tekken.json tokenizer.json tokenizer.model tokenizer.model.v3
tokenizer_config.json video_preprocessor_config.json vocab.json vocab.txt source.spm
additional_chat_templates/tool_use.jinja code/deep/layers.py
"""
LEFT_OUT = """
.gitattributes README.md pytorch_model.bin model.gguf consolidated.00.pth consolidated.safetensors
license.png model-fp16.safetensors notes.txt params.json training_args.bin tokenizer.bin
code/data.csv
"""
LEFT_FOLDERS = """
.cache/huggingface/x .eval_results/a.yaml .git/config original/params.json original/tokenizer.model
onnx/model.onnx original/tool.py __pycache__/modeling_some.cpython-311.pyc code/__pycache__/x.py
"""


def names(text: str) -> list[str]:
    return shlex.split(text)


def test_every_file_is_carried_or_named(folder: Path):
    index = [] if folder.name == "single" else ["model.safetensors.index.json"]
    for name in names(CARRIED) + names(LEFT_OUT) + names(LEFT_FOLDERS):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    carried, left_out = auxiliary_files(folder)
    assert carried == sorted([*names(CARRIED), "config.json", *index])
    folders = [".cache/", ".eval_results/", ".git/", "__pycache__/", "code/__pycache__/"]
    assert left_out == sorted([*names(LEFT_OUT), *folders, "onnx/", "original/"])


def test_every_file_a_tokenizer_of_transformers_asks_for_is_carried(single: Path):
    transformers = Path(pytest.importorskip("transformers").__file__).parent
    asked = set()
    for source in transformers.rglob("tokenization*.py"):
        block = re.search(r"^VOCAB_FILES_NAMES = \{(.*?)\}", source.read_text(), re.M | re.S)
        if block:
            asked |= set(re.findall(r':\s*"([^"]+\.\w+)"', block[1]))
    assert len(asked) > 10
    for name in asked:
        (single / name).write_text("x")
    assert asked - set(auxiliary_files(single)[0]) == set()


def test_a_carried_file_that_is_a_broken_link_stops(single: Path):
    (single / "tokenizer.json").symlink_to("gone")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a link to a file that is not"):
        auxiliary_files(single)


def test_a_broken_link_nobody_needs_is_only_named(single: Path):
    (single / "notes.txt").symlink_to("gone")
    assert auxiliary_files(single) == (["config.json"], ["notes.txt"])


def test_links_to_folders_are_named_and_not_entered(single: Path, tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret.py").write_text("x")
    (single / "code").symlink_to(tmp_path / "elsewhere")
    assert auxiliary_files(single) == (["config.json"], ["code/"])


# Fingerprints


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def count_hashing(monkeypatch) -> list:
    real, hashed = hashlib.file_digest, []

    def counting(stream, name):
        hashed.append(Path(stream.name).name)
        return real(stream, name)

    monkeypatch.setattr(hashlib, "file_digest", counting)
    return hashed


def test_fingerprint_is_the_hash_of_every_file(folder: Path):
    (folder / "README.md").write_text("not carried")
    base = Checkpoint.open(folder)
    files = [*base.weight_files, *auxiliary_files(folder)[0]]
    assert fingerprint(base) == {file: sha256_of(folder / file) for file in files}


def test_fingerprint_takes_the_name_of_a_hub_blob(hub_cache: Path, monkeypatch):
    hashed = count_hashing(monkeypatch)
    base = Checkpoint.open(hub_cache)
    result = fingerprint(base)
    assert {file: result[file] for file in base.weight_files} == {
        file: sha256_of(hub_cache / file) for file in base.weight_files
    }
    assert len(hashed) == 2  # config.json and the index, which are named by git's hash


def test_fingerprint_remembers_files_that_stay_and_hashes_those_that_change(
    single: Path, tmp_path: Path, monkeypatch
):
    base, cache = Checkpoint.open(single), tmp_path / "work" / "hashes.json"
    monkeypatch.setattr(FileHashes, "SETTLED_NS", -1)
    hashed = count_hashing(monkeypatch)
    first = fingerprint(base, cache=cache)
    assert fingerprint(base, cache=cache) == first
    assert sorted(hashed) == ["config.json", "model.safetensors"]
    weights = single / "model.safetensors"
    status = weights.stat()
    weights.write_bytes(bytes([*weights.read_bytes()[:-1], 1]))
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a restored archive has it
    changed = fingerprint(base, cache=cache)
    assert changed["model.safetensors"] == sha256_of(weights)
    assert changed["config.json"] == first["config.json"]
    assert len(hashed) == 3


def test_fingerprint_does_not_remember_a_file_that_was_just_written(single, tmp_path, monkeypatch):
    cache, hashed = tmp_path / "hashes.json", count_hashing(monkeypatch)
    for _ in range(2):
        fingerprint(Checkpoint.open(single), cache=cache)
    assert len(hashed) == 4
    assert not cache.exists()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"x": 1}', "\xff", "WRONG"])
def test_fingerprint_survives_any_cache(single: Path, tmp_path: Path, text: str):
    cache = tmp_path / "hashes.json"
    entry = {str(single / "config.json"): {"size": [], "sha256": 7}}
    cache.write_text(json.dumps(entry) if text == "WRONG" else text, encoding="latin-1")
    result = fingerprint(Checkpoint.open(single), cache=cache)
    assert result["config.json"] == sha256_of(single / "config.json")
