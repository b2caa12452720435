"""The process that loads a planned publication: no Python of the model's folder runs in it."""

from __future__ import annotations

import json

import pytest

from abliterator.publish import _load_check
from tests.model.test_trust import code

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
def test_a_publications_process(writable, tmp_path, monkeypatch, template, problem):
    """It runs in a model's folder, and its template may be a processor's."""
    ran = tmp_path / "ran"
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
