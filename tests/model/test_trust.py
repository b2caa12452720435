"""With trust off, no Python of a model's folder runs, nor any of the working folder in a child."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest

from abliterator.engines import TransformersEngine
from abliterator.errors import AbliteratorError
from abliterator.model import load_model, load_tokenizer, render_chat
from abliterator.publish import _load_check


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


WALKS_PARTS = (
    "{% for m in messages %}{{ m.role }}: {% for p in m.content %}"
    "{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (None, None),
        (WALKS_PARTS, None),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "leaves out the question"),
        ("{{ 1/0 }}", "cannot render a question: division by zero"),
    ],
)
def test_a_publications_process(writable, ran, monkeypatch, template, problem):
    """It runs in a model's folder, and its template may be a processor's."""
    for name in ("torch", "transformers", "json", "abliterator", "sitecustomize"):
        (writable / f"{name}.py").write_text(code(ran))
    if template:
        (writable / "chat_template.jinja").unlink()
        (writable / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    monkeypatch.chdir(writable)
    found = _load_check._run([str(writable)], remote_code=False)
    if problem:
        assert problem in found["error"]
    else:
        assert (found["missing"], found["finite"]) == ([], True)
    assert not ran.exists()
