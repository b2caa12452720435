"""Columns that mark prompts which resemble each other."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset
from pydantic import TypeAdapter

from abliterator.errors import PromptError
from abliterator.prompts import PromptSet, drop_overlap, hold_out, load_prompts
from abliterator.recipe import Source

ROWS = [
    {"prompt": "Call my home.", "form": "call my"},
    {"prompt": "Call my team.", "form": "call my"},
    {"prompt": "Read my mail.", "form": "read my"},
    {"prompt": "call my HOME", "form": "other"},  # a duplicate: the first stays
    {"prompt": "Boil rice.", "form": None},
    {"prompt": "Name ten rivers.", "form": 3},
]


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)))
    return file


def test_each_prompt_keeps_its_cluster(path):
    loaded = load_prompts("target", Source(path=path, cluster="form"))
    assert loaded.clusters == ("call my", "call my", "read my", None, "3")
    assert load_prompts("target", Source(path=path)).clusters == ()
    cluster_of = dict(zip(loaded.prompts, loaded.clusters, strict=True))
    sides = hold_out(loaded, fraction=0.4, seed=1)
    left = drop_overlap(loaded, sides[1])
    for part in (*sides, left):
        assert part.clusters == tuple(cluster_of[prompt] for prompt in part.prompts)
    stored = TypeAdapter(PromptSet)
    assert stored.validate_json(stored.dump_json(loaded)) == loaded


def test_a_dataset_has_them_too(monkeypatch):
    from abliterator.prompts import _hub

    rows = Dataset.from_list([{**row, "form": str(row["form"])} for row in ROWS])
    assert _hub._clusters(rows, [0, 2], Source(dataset="a/b", cluster="form")) == (
        "call my",
        "read my",
    )
    with pytest.raises(PromptError, match="column topic of `cluster` is missing"):
        _hub._clusters(rows, [0, 2], Source(dataset="a/b", cluster="topic"))


@pytest.mark.parametrize("column", ["topic", "nested"])
def test_what_is_no_column_of_clusters(tmp_path, column):
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"prompt": "Boil teapots.", "nested": ["x"]}))
    with pytest.raises(PromptError, match=f"column {column} of `cluster` is missing") as raised:
        load_prompts("target", Source(path=file, cluster=column))
    assert "teapots" not in str(raised.value)


def test_plain_text_has_no_columns(tmp_path):
    (tmp_path / "a.txt").write_text("One.\n")
    with pytest.raises(PromptError, match=r"column 'form'.*plain text"):
        load_prompts("target", Source(path=tmp_path / "a.txt", cluster="form"))


def test_every_prompt_needs_one():
    with pytest.raises(PromptError, match="1 groups in the column `cluster` and are 2"):
        PromptSet(name="t", prompts=("a", "b"), source="s", clusters=("x",))
