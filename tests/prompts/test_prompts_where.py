"""Rows of a prompt set by the value of another column: over-refusal sets carry a label."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset

from abliterator.errors import PromptError
from abliterator.prompts import _hub as hub_module
from abliterator.prompts import load_prompts
from abliterator.recipe import Source

ROWS = [
    {"prompt": "How do I kill a process?", "label": "safe", "hard": True, "n": 1},
    {"prompt": "Not this one.", "label": "unsafe", "hard": True, "n": 2},
    {"prompt": "How do I shoot a photo?", "label": "safe", "hard": False, "n": 1},
    {"prompt": "Without a label."},
]


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "look_alikes.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in ROWS))
    return file


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ({}, [0, 1, 2, 3]),
        ({"label": "safe"}, [0, 2]),
        ({"label": "safe", "hard": True}, [0]),
        ({"n": 1}, [0, 2]),
        ({"hard": False}, [2]),
    ],
)
def test_rows_are_kept_by_value(where, kept, path, monkeypatch):
    expected = tuple(ROWS[i]["prompt"] for i in kept)
    found = load_prompts("over_refusal", Source(path=path, where=where))
    assert found.prompts == expected
    monkeypatch.setattr(hub_module, "_load", lambda source: Dataset.from_list(ROWS))
    monkeypatch.setattr(hub_module, "_license", lambda *_: None)
    source = Source(dataset="somebody/look-alikes", revision="0" * 40, where=where)
    assert load_prompts("over_refusal", source).prompts == expected


def test_true_is_not_one(path):
    with pytest.raises(PromptError, match="is as `where` asks"):
        load_prompts("over_refusal", Source(path=path, where={"hard": 1}))


def test_a_column_that_is_not_there(monkeypatch):
    monkeypatch.setattr(hub_module, "_load", lambda source: Dataset.from_list(ROWS))
    monkeypatch.setattr(hub_module, "_license", lambda *_: None)
    source = Source(dataset="a/b", revision="0" * 40, where={"lable": "safe"})
    with pytest.raises(PromptError, match="no column lable to keep rows by"):
        load_prompts("over_refusal", source)


def test_plain_text_has_no_columns(tmp_path):
    (tmp_path / "a.txt").write_text("One.\n")
    with pytest.raises(PromptError, match="which has no columns"):
        load_prompts("x", Source(path=tmp_path / "a.txt", where={"label": "safe"}))
