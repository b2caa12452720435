"""With trust off, no Python of a model's folder runs."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest

from abliterator.engines import TransformersEngine
from abliterator.errors import AbliteratorError
from abliterator.model import load_model, load_tokenizer, render_chat


@pytest.fixture
def ran(tmp_path):
    """A file that code of the folder's own would leave."""
    return tmp_path / "ran"


def code(ran):
    return (
        f"open({str(ran)!r}, 'a').write(__name__)\nclass Own: pass\ndef generate(*a, **k): pass\n"
    )


def change(file, **settings):
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_code_of_a_tokenizer_does_not_run(writable, ran):
    (writable / "own.py").write_text(code(ran))
    change(
        writable / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["own.Own", "own.Own"]},
        tokenizer_class="Own",
    )
    with suppress(AbliteratorError):
        render_chat(load_tokenizer(writable), "Where?")
    assert not ran.exists()


def test_code_that_generates_does_not_run(writable, ran):
    (writable / "custom_generate").mkdir()
    (writable / "custom_generate" / "generate.py").write_text(code(ran))
    change(writable / "config.json", auto_map={"AutoModelForCausalLM": "own.Own"})
    (writable / "own.py").write_text(code(ran))
    loaded = load_model(writable, device="cpu", dtype="float32")
    ids = render_chat(loaded.tokenizer, "Where?")
    assert TransformersEngine(loaded).answers([ids], max_new_tokens=2, batch_size=1, stop_ids=(2,))
    assert not ran.exists()
