"""Folders that are not what they claim: a named error or a sound result, nothing in between."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from abliterator import pipeline
from abliterator.anatomy import require_countable
from abliterator.checkpoint import Checkpoint, card_metadata, declared_base_models
from abliterator.errors import (
    AbliteratorError,
    CheckpointError,
    FileError,
    GenerationError,
    PromptError,
    RecipeError,
)
from abliterator.files import require_plain_folder, require_regular_files
from abliterator.model import Limits, foreign, load_model, load_tokenizer, stored_limits
from abliterator.prompts import load_prompts
from abliterator.recipe import Source, load_recipe
from tests.hostile_folders.cards import CARDS
from tests.hostile_folders.running import make_sound, run_all


@pytest.mark.slow
def test_fifty_folders_of_the_generator(tmp_path):
    """`python -m tests.hostile_folders` runs as many as one likes."""
    make_sound(tmp_path)
    found = run_all(11, list(range(50)), tmp_path, lambda outcome: None)
    faults = [outcome for outcome in found if outcome.fault]
    assert not faults
    assert len(found) == 150
    assert {outcome.code for outcome in found} == {0, 1}


# ---- the boundary to libraries


class Panic(BaseException):
    """As pyo3's PanicException, which derives from BaseException."""


@pytest.mark.parametrize(
    "raised",
    [
        *(ValueError("a\nb"), KeyError("x"), Panic("panicked"), SystemExit(0), RecursionError()),
        *(MemoryError(), Exception("\ud800\x1b"), UnicodeDecodeError("utf-8", b"x", 0, 1, "no")),
    ],
)
def test_whatever_a_library_raises_has_a_name(raised):
    with pytest.raises(GenerationError) as caught, foreign("It cannot load", "Mend it."):
        raise raised
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith("It cannot load: ")
    assert message.endswith(". Mend it.")
    assert caught.value.__cause__ is raised


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), CheckpointError("named"), GeneratorExit()])
def test_interruption_and_named_errors_pass_the_boundary(raised):
    with pytest.raises(type(raised)) as caught, foreign("It cannot load", "Mend it."):
        raise raised
    assert caught.value is raised


def change(folder: Path, file: str, **values: object) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("config.json", {"attention_bias": None}),
        ("config.json", {"head_dim": 0}),
        ("config.json", {"vocab_size": 0}),
        ("config.json", {"vocab_size": 10**9}),
        ("config.json", {"hidden_size": 10**7}),
        ("config.json", {"num_labels": 10**12}),
        ("config.json", {"num_hidden_layers": 10**9}),
        ("config.json", {"num_hidden_layers": 30}),
        ("config.json", {"dtype": []}),
        ("config.json", {"rope_parameters": {"rope_type": 3}}),
        ("config.json", {"hidden_act": "\ud800"}),
        *(("config.json", {"text_config": wrong}) for wrong in ({}, 0.5, True, 7)),
        ("generation_config.json", {"eos_token_id": [1, "a"]}),
        ("generation_config.json", {"eos_token_id": -5}),
        ("generation_config.json", {"eos_token_id": {"a": 1}}),
        ("tokenizer.json", {"post_processor": {"type": "Nonsense"}}),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {}, "merges": [["x", "y"]]}}),
        ("tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", "extra_ids": "x"}),
        ("tokenizer_config.json", {"extra_special_tokens": {"a": [3]}}),
        ("tokenizer_config.json", {"unk_token": ""}),
    ],
)
def test_what_transformers_cannot_use_is_a_named_error(writable, file, values):
    change(writable, file, **values)
    with pytest.raises(AbliteratorError) as caught:
        load_model(writable, device="cpu", dtype=None)
    assert str(caught.value).isprintable()


def test_limits_of_a_config_that_cannot_be_read_are_left_to_loading(writable):
    change(writable, "config.json", text_config=0.5)
    assert stored_limits(writable) == Limits()


def test_a_model_that_loads_and_does_not_run_is_named_when_it_is_loaded(writable):
    load_model(writable, device="cpu", dtype=None)
    change(writable, "config.json", is_encoder_decoder=True)  # which only `generate` looks at
    with pytest.raises(GenerationError, match="does not run with transformers"):
        load_model(writable, device="cpu", dtype=None)


@pytest.mark.parametrize(
    "config",
    [
        {"num_labels": 10**9},
        {"text_config": {"num_hidden_layers": 10**9}},
        {"parts": [{"n_routed_experts": 1e300}]},
    ],
)
def test_counts_beyond_any_model_are_refused_at_every_level(config):
    with pytest.raises(CheckpointError, match="expected a whole number up to 65536"):
        require_countable(config)
    require_countable({"vocab_size": 10**9, "num_hidden_layers": 128, "rope_theta": 10**12})


# ---- links, pipes, devices, sizes


@pytest.fixture
def secret(tmp_path) -> Path:
    path = tmp_path / "private.txt"
    path.write_text("private")
    return path


@pytest.mark.parametrize("name", ["terms_of_use.txt", "README.md", "notes.xyz", "sub/a.jinja"])
@pytest.mark.parametrize("relative", [True, False])
def test_links_that_leave_the_folder_are_refused(writable, secret, name, relative):
    link = writable / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(secret, link.parent) if relative else secret)
    for read in (Checkpoint.open, load_tokenizer, require_plain_folder):
        with pytest.raises(FileError, match="outside of the model's folder"):
            read(writable)


def test_linked_folders_that_leave_are_refused_and_links_inside_are_followed(writable, secret):
    (writable / "LICENSE").write_text("terms")
    (writable / "NOTICE").symlink_to("LICENSE")
    (writable / "gone.txt").symlink_to("not-there")
    (writable / ".cache").mkdir()
    (writable / ".cache" / "x").symlink_to(secret)
    Checkpoint.open(writable)
    linked = writable.parent / "linked"
    linked.symlink_to(writable)  # the folder itself may be a link
    Checkpoint.open(linked)
    (writable / "additional_chat_templates").symlink_to(secret.parent)
    with pytest.raises(FileError, match="outside"):
        Checkpoint.open(writable)


def test_only_the_layout_of_the_hub_cache_may_leave(writable, tmp_path, secret):
    model = tmp_path / "models--a--b"
    snapshot, blobs = model / "snapshots" / ("c" * 40), model / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(writable.iterdir())):
        blob = blobs / f"{number:040x}"
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    Checkpoint.open(snapshot)
    load_tokenizer(snapshot)
    (blobs / ("f" * 40)).symlink_to(secret)  # by way of the blobs, out of the cache
    (snapshot / "NOTICE").symlink_to("../../blobs/" + "f" * 40)
    with pytest.raises(FileError, match="outside"):
        Checkpoint.open(snapshot)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "vocab.txt", "README.md", "x"])
def test_pipes_and_devices_are_refused_before_they_are_opened(writable, name):
    (writable / name).unlink(missing_ok=True)
    os.mkfifo(writable / name)
    for read in (Checkpoint.open, load_tokenizer):
        with pytest.raises(FileError, match="not a regular file"):
            read(writable)
    (writable / name).unlink()
    (writable / name).symlink_to("/dev/zero")
    with pytest.raises(FileError):
        Checkpoint.open(writable)


@pytest.mark.parametrize(
    ("name", "size"),
    [("tokenizer_config.json", 1 << 25), ("tokenizer.json", 1 << 34), ("a.jinja", 1 << 23)],
)
def test_files_too_large_to_be_read_whole_are_refused(writable, name, size):
    with (writable / name).open("ab") as file:
        file.truncate(size)
    with pytest.raises(FileError, match="at most"):
        Checkpoint.open(writable)
    with pytest.raises(FileError, match="at most"):
        load_tokenizer(writable)


@pytest.mark.parametrize("kind", ["pipe", "device", "large"])
def test_prompts_and_recipes_are_regular_files_of_a_bounded_size(tmp_path, kind):
    path = tmp_path / "p.txt"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(1 << 35)
    with pytest.raises(PromptError):
        load_prompts("target", Source(path=path))
    with pytest.raises(RecipeError):
        load_recipe(path)


def test_a_file_to_publish_is_no_link(tmp_path, secret):
    (tmp_path / "own").write_text("x")
    require_regular_files([tmp_path / "own"])
    (tmp_path / "link").symlink_to("own")
    for path in (tmp_path / "link", tmp_path / "absent", tmp_path):
        with pytest.raises(FileError):
            require_regular_files([path])


# ---- cards


@pytest.mark.parametrize("kind", sorted(CARDS))
def test_whatever_a_card_says_is_plain_or_nothing(tmp_path, kind):
    (tmp_path / "README.md").write_text(f"---\n{CARDS[kind]()}\n---\n# x\n", encoding="utf-8")
    found = card_metadata(tmp_path)
    json.dumps(found, allow_nan=False, ensure_ascii=False).encode()
    declared_base_models(found or {})


@pytest.mark.parametrize("kind", ["aliases", "deep lists", "deep blocks", "an open quote"])
def test_a_card_that_cannot_be_read_is_told_by_the_plan(writable, kind):
    (writable / "README.md").write_text(f"---\n{CARDS[kind]()}\n---\n")
    plan = pipeline.plan_model(str(writable), writable.parent / "out")
    assert plan.card == {}
    assert any("front matter" in note for note in plan.notes)


def test_a_sound_card_is_read_when_the_plan_is_made(writable):
    text = "---\r\nlicense: apache-2.0\nlanguage: [en]\nbase_model: a/b\nnew: 2024-02-03\n---\n# x"
    (writable / "README.md").write_text(text)
    plan = pipeline.plan_model(str(writable), writable.parent / "out")
    assert plan.card == {"license": "apache-2.0", "language": ["en"], "base_model": "a/b"}
    assert declared_base_models(plan.card) == ("a/b",)
    assert not any("front matter" in note for note in plan.notes)
    (writable / "README.md").write_text("# A model without front matter\n---\na: 1\n---\n")
    assert card_metadata(writable) == {}


# ---- an index that names a tied head


def with_index_of_a_head(folder: Path, *, tied: bool) -> Path:
    weights = load_file(folder / "model.safetensors")
    weights.pop("lm_head.weight", None)
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "a.safetensors", metadata={"format": "pt"})
    index = dict.fromkeys([*weights, "lm_head.weight"], "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    change(folder, "config.json", tie_word_embeddings=tied)
    return folder


def test_an_index_may_name_a_tied_head_that_no_shard_holds(writable):
    folder = with_index_of_a_head(writable, tied=True)
    assert "lm_head.weight" not in Checkpoint.open(folder).tensors
    model = load_model(folder, device="cpu", dtype="float32").model
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_a_head_of_its_own_that_is_missing_is_refused(writable):
    with pytest.raises(FileError, match=r"lm_head\.weight, which is not in it"):
        Checkpoint.open(with_index_of_a_head(writable, tied=False))


def test_another_missing_tensor_is_refused_with_a_tied_head(writable):
    folder = with_index_of_a_head(writable, tied=True)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.0.x.weight"] = "a.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(FileError, match=r"0\.x\.weight, which is not in it"):
        Checkpoint.open(folder)
