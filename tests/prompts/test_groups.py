"""Columns of prompt files and datasets as groups: read, carried along, stored."""

from __future__ import annotations

import json

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from pydantic import TypeAdapter

from abliterator.errors import PromptError
from abliterator.prompts import PromptSet, count_near, drop_overlap, hold_out, load_prompts
from abliterator.prompts import _hub as hub_module
from abliterator.recipe import Source

SECRET = "Describe forbidden teapots"
ROWS = [
    {"prompt": "What is a kettle?", "category": "tea", "language": "en", "level": 1},
    {"prompt": "What is a KETTLE?", "category": "none", "language": "de", "level": 2},
    {"prompt": "Was ist ein Krug?", "category": "tea", "language": "de", "level": 2},
    {"prompt": "What is a hook?", "category": " knitting ", "language": None, "level": 3},
    {"prompt": "What is a bobbin?", "category": "knitting", "level": 3},
]


@pytest.fixture
def path(tmp_path):
    return written(tmp_path, ROWS)


def written(folder, rows):
    file = folder / "requests.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def from_dataset(monkeypatch, rows, **settings) -> PromptSet:
    monkeypatch.setattr(hub_module, "_load", lambda source: rows)
    monkeypatch.setattr(hub_module, "_license", lambda *_: None)
    return load_prompts("target", Source(dataset="a/b", revision="0" * 40, **settings))


EXPECTED = {
    "category": ("tea", "tea", "knitting", "knitting"),
    "language": ("en", "de", None, None),
}


def test_category_and_language_are_groups_unless_the_source_says_otherwise(path, monkeypatch):
    rows = Dataset.from_list(ROWS)
    for groups, expected in (
        (None, EXPECTED),
        ((), {}),
        (("level",), {"level": ("1", "2", "3", "3")}),
    ):
        loaded = load_prompts("target", Source(path=path, groups=groups))
        assert loaded.groups == expected
        assert from_dataset(monkeypatch, rows, groups=groups).groups == expected


def test_classes_of_a_dataset_have_their_names_and_empty_rows_none(monkeypatch):
    names = ClassLabel(names=["tea", "knitting"])
    rows = Dataset.from_dict(
        {"text": ["One?", "", "Two?", "Three?"], "category": [1, 0, 0, None]},
        features=Features({"text": Value("string"), "category": names}),
    )
    loaded = from_dataset(monkeypatch, rows)
    assert loaded.groups == {"category": ("knitting", "tea", None)}
    assert loaded.dropped == 1


def test_a_limit_keeps_prompts_and_groups_together(path):
    assert load_prompts("target", Source(path=path, limit=2)).groups == {
        "category": ("tea", "tea"),
        "language": ("en", "de"),
    }


@pytest.mark.parametrize(
    ("cells", "problem"),
    [
        ([SECRET * 4, "b"], "a value of 104 characters"),
        ([f"{SECRET} {i}" for i in range(51)], "51 different values"),
        ([["tea"], "b"], "cells of type list"),
        ([None, " "], "missing or empty"),
    ],
)
def test_what_is_no_column_of_groups_is_an_error_where_it_is_named(cells, problem, tmp_path):
    rows = [{"prompt": f"What is {i}?", "category": cell} for i, cell in enumerate(cells)]
    file = written(tmp_path, rows)
    assert load_prompts("target", Source(path=file)).groups == {}
    with pytest.raises(PromptError, match=problem) as raised:
        load_prompts("target", Source(path=file, groups=("category",)))
    assert "teapots" not in str(raised.value)


def test_a_column_that_is_not_there(path, tmp_path, monkeypatch):
    with pytest.raises(PromptError, match="column topic of `groups` is missing"):
        load_prompts("target", Source(path=path, groups=("topic",)))
    with pytest.raises(PromptError, match="no column topic for `groups`"):
        from_dataset(monkeypatch, Dataset.from_list(ROWS), groups=("topic",))
    (tmp_path / "a.txt").write_text("One.\n")
    with pytest.raises(PromptError, match="remove `column`, `where` and `groups`"):
        load_prompts("target", Source(path=tmp_path / "a.txt", groups=("topic",)))
    assert load_prompts("target", Source(path=tmp_path / "a.txt")).groups == {}


def test_splits_and_overlaps_keep_each_prompt_with_its_group():
    prompts = tuple(f"What is {word}?" for word in "abcdefghij")
    whole = PromptSet(
        name="t", prompts=prompts, source="s", groups={"category": tuple("abcdefghij")}
    )
    sides = hold_out(whole, fraction=0.3, seed=4)
    left = drop_overlap(sides[0], PromptSet(name="e", prompts=sides[0].prompts[:2], source="s"))
    for part in (*sides, left, count_near(left, [whole])):
        assert part.groups["category"] == tuple(prompt[8] for prompt in part.prompts)


def test_groups_that_do_not_belong_to_the_prompts_are_refused():
    with pytest.raises(PromptError, match="2 groups in the column category and are 1"):
        PromptSet(name="t", prompts=("a",), source="s", groups={"category": ("x", "y")})


def test_a_stored_set_has_its_groups_and_one_without_is_stored_as_before(path):
    stored = TypeAdapter(PromptSet)
    loaded = load_prompts("target", Source(path=path))
    assert stored.validate_json(stored.dump_json(loaded)) == loaded
    plain = PromptSet(name="target", prompts=("a", "b"), source="s")
    before = (
        '{"name":"target","prompts":["a","b"],"source":"s","revision":null,"split":null,'
        '"license":null,"read":0,"dropped":0,"overlap":0,"near":null,'
        '"sha256":"0473ef2dc0d324ab659d3580c1134e9d812035905c4781fdd6d529b0c6860e13"}'
    )
    assert stored.dump_json(plain).decode() == before
    assert stored.validate_json(before) == plain
