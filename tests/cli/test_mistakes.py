"""What a newcomer gets wrong: each message names the next step, before a model is loaded."""

import json
import shutil

import pytest
from click.testing import CliRunner

from abliterator import model
from abliterator.cli import main
from abliterator.errors import AbliteratorError

MISTAKES = {
    # name: (recipe's lines by key, further arguments, what the message says)
    "a wrong path": ({"model": "./nowhere"}, [], "Give the folder of a checkpoint"),
    "a hub id offline": ({"model": "somebody/model"}, [], "Connect to the network"),
    "a misspelt key": ({"layres": "[2]"}, [], "did you mean `layers`?"),
    "layers that are not there": ({"layers": "[9]"}, [], "the model has layers 1 to 3"),
    "a layer without brackets": ({"layers": "2"}, [], "write `[2]`"),
    "k above the layers": ({"k": "3"}, [], "Name more layers, or lower k"),
    "a missing column": ({}, ["--set", "prompts.target.column=question"], "another key"),
    "a missing prompt file": ({}, ["--set", "prompts.target.path=no.txt"], "no prompt file"),
    "a key that is not set": (
        {"judge": "{kind: openai, base_url: 'https://x.example', model: m, api_key_env: NO_KEY}"},
        [],
        "environment variable NO_KEY, which is not set. Set it",
    ),
    "a folder in use": ({}, ["--out", "foreign"], "Choose another --out"),
    "an absent device": ({}, ["--device", "cuda:7"], "Choose one of these, or `auto`"),
    "a full disk": ({}, [], "Make room, or choose another --out"),
    "no chat template": ({}, [], "chat template"),
}


@pytest.fixture
def project(tmp_path, tiny_folder, monkeypatch):
    """A working folder with prompt files; returns the lines of a recipe by key."""
    monkeypatch.chdir(tmp_path)
    for name in "tn":
        lines = [json.dumps({"prompt": f"{name}: where is the {x}?"}) for x in "abcdefgh"]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "photo").write_text("mine")
    base = shutil.copytree(tiny_folder(), tmp_path / "base")
    prompts = "{target: {path: t.jsonl}, neutral: {path: n.jsonl}}"
    return base, {"model": "base", "layers": "[2]", "k": "1", "prompts": prompts}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_message_names_the_next_step(project, mistake, monkeypatch, tmp_path):
    changes, arguments, says = MISTAKES[mistake]
    base, lines = project
    if mistake == "no chat template":
        (base / "chat_template.jinja").unlink()
    if mistake == "a full disk":
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    def load(*_, **__):
        raise AssertionError("a model was loaded")

    if mistake != "no chat template":  # which is the tokenizer's
        monkeypatch.setattr(model, "load_model", load)
    text = "\n".join(f"{key}: {value}" for key, value in (lines | changes).items())
    (tmp_path / "r.yaml").write_text(text + "\n")
    done = CliRunner().invoke(main, ["build", "r.yaml", *arguments, "--device", "cpu", *arguments])
    assert done.exit_code == 1, done.output
    message = " ".join(done.stderr.split())
    assert says in message
    names = {kind.__name__ for kind in _children(AbliteratorError)}
    assert any(f"{name}: " in message for name in names)
    assert not (tmp_path / "out" / "r" / "checkpoint").exists()


def _children(kind):
    for child in kind.__subclasses__():
        yield child
        yield from _children(child)
