"""Qwen 1 as Qwen 2: the same logits from the same numbers, the same tokens from the same text."""

from __future__ import annotations

import base64
import importlib.util
import json
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest
import regex
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from abliterator.anatomy import anatomy_of
from abliterator.engines import TransformersEngine
from abliterator.model import load_model, render_chat

SCRIPT = Path(__file__).parents[2] / "scripts" / "qwen1" / "make_model.py"
spec = importlib.util.spec_from_file_location("qwen1_make_model", SCRIPT)
make_model = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_model)

MERGES = [b"th", b"he", b"the", b" t", b" the", b"in", b"ing", b"\xc3\xa9", b"\n\n", b"  ", b"12"]
RANKS = {token: i for i, token in enumerate([bytes([b]) for b in range(256)] + MERGES)}


@pytest.fixture(scope="module")
def original(tiny_folder, tmp_path_factory):
    """The tiny Qwen 1, with the tokenizer and generation files that Qwen-1.8B-Chat has."""
    folder = tmp_path_factory.mktemp("qwen1")
    for file in tiny_folder("qwen").iterdir():
        if file.is_file() and "token" not in file.name and "template" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    lines = (f"{base64.b64encode(token).decode()} {rank}" for token, rank in RANKS.items())
    (folder / "qwen.tiktoken").write_text("\n".join(lines) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({"chat_format": "chatml"}))
    (folder / "LICENSE").write_text("terms")
    return folder


@pytest.fixture(scope="module")
def converted(original, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "model"
    done = CliRunner().invoke(make_model.main, [str(original), str(out)])
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture(scope="module")
def tokenizer(converted):
    return load_model(converted, device="cpu", dtype=None).tokenizer


def test_logits_are_the_same(tiny_loaded, converted):
    loaded = load_model(converted, device="cpu", dtype="float32")
    assert type(loaded.model).__name__ == "Qwen2ForCausalLM"
    ids = torch.randint(0, 384, (3, 40))
    with torch.inference_mode():
        expected = tiny_loaded("qwen").model(ids).logits
        found = loaded.model(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert anatomy_of(json.loads((converted / "config.json").read_text())).n_layers == 3


def test_chats_and_stops_are_those_of_its_own_code(converted):
    loaded = load_model(converted, device="cpu", dtype=None)
    assert loaded.tokenizer.decode(render_chat(loaded.tokenizer, "the thing")) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nthe thing<|im_end|>\n<|im_start|>assistant\n"
    )
    start = len(RANKS)  # special tokens follow the ordinary ones
    assert TransformersEngine(loaded).stop_ids == (start, start + 1, start + 2)
    assert (converted / "LICENSE").read_text() == "terms"


def reference(text):
    """Byte pairs merged by rank, word by word: what tiktoken does."""
    ids = []
    for word in regex.findall(make_model.WORDS, unicodedata.normalize("NFC", text)):
        parts = [bytes([b]) for b in word.encode()]
        while len(parts) > 1:
            ranks = [RANKS.get(a + b, 1 << 30) for a, b in pairwise(parts)]
            best = ranks.index(min(ranks))
            if ranks[best] == 1 << 30:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        ids += [RANKS[part] for part in parts]
    return ids


@pytest.fixture(scope="module")
def tokenizer_file(converted):
    """What tools other than transformers read."""
    return Tokenizer.from_file(str(converted / "tokenizer.json"))


@settings(max_examples=200)
@given(st.text("the in\ng 12é\u0301e'S你🙂\t", max_size=30))
def test_tokens_are_the_same(tokenizer, tokenizer_file, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == reference(text)
    assert tokenizer_file.encode(text).ids == ids
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(
    ("key", "value"), [("model_type", "qwen2"), ("no_bias", False), ("rotary_pct", 0.25)]
)
def test_what_qwen_2_cannot_say_is_refused(original, key, value):
    config = json.loads((original / "config.json").read_text())
    with pytest.raises(make_model.click.ClickException):
        make_model.convert_config({**config, key: value})


def test_nothing_is_overwritten(original, tmp_path):
    done = CliRunner().invoke(make_model.main, [str(original), str(tmp_path)])
    assert done.exit_code == 1
    assert "exists already" in done.output
    assert not list(tmp_path.iterdir())
