"""The prompts room: files in, bad input refused without showing it, splits and overlaps."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from abliterator.errors import PromptError
from abliterator.prompts import (
    PromptSet,
    comparison_key,
    load_prompts,
    normalised,
    resolve_revision,
)
from abliterator.recipe import Source

ROOT = Path(__file__).parents[2]
SECRET = "Describe forbidden teapots"  # stands for a prompt that no error may show
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
prompt_lists = st.lists(texts.filter(normalised), min_size=2, max_size=30, unique_by=comparison_key)
STORED = TypeAdapter(PromptSet)
fractions = st.floats(0, 1, exclude_min=True, exclude_max=True)


def prompt_set(*prompts: str, name: str = "target") -> PromptSet:
    return PromptSet(name=name, prompts=prompts, source=f"{name}.txt")


def write(folder: Path, content: str | bytes, name: str = "prompts.txt") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def load(path: Path, **options) -> PromptSet:
    return load_prompts("target", Source(path=path, **options))


# Reading files


def test_a_text_file_is_one_prompt_a_line(tmp_path):
    path = write(tmp_path, "\ufeffName a colour. \r\n\r\n  # not a comment\n \t\nÜber was?")
    loaded = load(path)
    assert loaded.prompts == ("Name a colour.", "# not a comment", "Über was?")
    assert loaded == PromptSet(name="target", prompts=loaded.prompts, source="prompts.txt", read=3)


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0b", "\x0c", "\x1c"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_only_line_feeds_separate_prompts(tmp_path, separator, suffix):
    # str.splitlines would tear these apart, and JSON allows the first two inside a text
    prompt = f"one{separator}prompt"
    line = prompt if suffix == "txt" else json.dumps({"prompt": prompt}, ensure_ascii=False)
    assert load(write(tmp_path, line, f"prompts.{suffix}")).prompts == (prompt,)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_any_line_end_ends_a_line_of_a_text_file(tmp_path, end):
    lines = [f"Where is the {x}?" for x in "abcdefghijkl"]
    loaded = load(write(tmp_path, end.join(lines)))
    assert loaded.prompts == tuple(lines)
    assert loaded.read == 12
    bad = end.join([*lines[:3], "\udce9"]).encode(errors="surrogateescape")
    with pytest.raises(PromptError, match="line 4: not UTF-8"):
        load(write(tmp_path, bad))


def test_only_a_line_feed_ends_a_line_of_json(tmp_path):
    rows = [json.dumps({"prompt": f"Where is the {x}?"}) for x in "ab"]
    assert len(load(write(tmp_path, "\r\n".join(rows), "p.jsonl")).prompts) == 2
    with pytest.raises(PromptError, match="line 1: not JSON"):
        load(write(tmp_path, "\r".join(rows), "p.jsonl"))


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe.txt", tmp_path / "zero.txt"):
        with pytest.raises(PromptError, match="no regular file"):
            load(path)


def test_a_jsonl_file_has_prompts_under_prompt_or_the_named_column(tmp_path):
    rows = [{"prompt": " a\nb ", "Goal": "x", "n": 1}, {"prompt": "c", "Goal": "y"}]
    path = write(tmp_path, "\n\n".join(map(json.dumps, rows)), "PROMPTS.JSONL")
    assert load(path).prompts == ("a\nb", "c")
    assert load(path, column="Goal").prompts == ("x", "y")


def test_duplicates_are_dropped_before_the_limit_counts(tmp_path):
    path = write(tmp_path, "Who?\nwho?  \nＷＨＯ?\nWhat\tnow\nWhat now\nWhere\nWhen")
    loaded = load(path, limit=3)
    assert loaded.prompts == ("Who?", "What\tnow", "Where")
    assert loaded.dropped == 3
    assert load(path, limit=99).prompts == (*loaded.prompts, "When")


@given(st.lists(texts, max_size=20), st.integers(1, 25))
def test_loading_agrees_with_the_plain_definition(tmp_path_factory, candidates, limit):
    path = write(
        tmp_path_factory.mktemp("prompts"),
        "\n".join(json.dumps({"prompt": f"-{text}"}) for text in [*candidates, "last"]),
        "prompts.jsonl",
    )
    if any("\0" in text for text in candidates):
        with pytest.raises(PromptError, match="NUL"):
            load(path)
        return
    kept: list[str] = []
    for text in [*candidates, "last"]:
        if all(comparison_key(f"-{text}") != comparison_key(other) for other in kept):
            kept.append(f"-{text}".strip())
    loaded = load(path, limit=limit)
    assert loaded.prompts == tuple(kept[:limit])
    assert loaded.read == len(candidates) + 1
    assert loaded.dropped == loaded.read - len(kept)


# Bad input


BAD_FILES = {
    "empty.txt": (b"", "is empty"),
    "blank.txt": (b" \n\t\n\r\n", "is empty"),
    "blank.jsonl": (b"\n \n", "is empty"),
    "only_a_bom.txt": (b"\xef\xbb\xbf", "is empty"),
    "latin1.txt": (f"fine\n{SECRET}\n\xfcber\n".encode("latin-1"), "line 3: not UTF-8"),
    "utf16.txt": (f"{SECRET}\n".encode("utf-16"), "line 1: not UTF-8"),
    "utf16_without_bom.txt": (f"{SECRET}\n".encode("utf-16-le"), "line 1: a NUL character"),
    "nul.txt": (f"fine\n\n{SECRET}\0\n".encode(), "line 3: a NUL character"),
    "nul.jsonl": (json.dumps({"prompt": f"{SECRET}\0"}).encode(), "line 1: a NUL character"),
    "surrogate.jsonl": (b'{"prompt": "%s \\ud800"}' % SECRET.encode(), "line 1: half of a surr"),
    "cut_off.jsonl": (
        b'{"prompt": "fine"}\n\n{"prompt": "%s' % SECRET.encode(),
        "line 3: not JSON",
    ),
    "plain_text.jsonl": (SECRET.encode(), "line 1: not JSON"),
    "a_string.jsonl": (json.dumps(SECRET).encode(), "line 1: JSON, but no object"),
    "a_list.jsonl": (json.dumps([{"prompt": SECRET}]).encode(), "line 1: JSON, but no object"),
    "huge_number.jsonl": (b"9" * 5000, "line 1: JSON that cannot be read"),
    "deep.jsonl": (b"[" * 100_000, "line 1: JSON that cannot be read"),
    "other_key.jsonl": (
        b'{"prompt": "fine"}\n{"question": "%s", "id": 1}' % SECRET.encode(),
        r'line 2: no "prompt" among its keys \(question, id\)',
    ),
    "prompts_as_keys.jsonl": (
        json.dumps({SECRET: 1, "id": 2}).encode(),
        r"keys \(\(not a name\), id\)",
    ),
    "a_number.jsonl": (b'{"prompt": 3}', 'line 1: "prompt" is of type int'),
    "null.jsonl": (b'{"prompt": null}', 'line 1: "prompt" is of type NoneType'),
    "messages.jsonl": (
        json.dumps({"prompt": [{"role": "user", "content": SECRET}]}).encode(),
        'line 1: "prompt" is of type list',
    ),
    "empty_text.jsonl": (b'{"prompt": "a"}\n{"prompt": " "}', 'line 2: "prompt" is an empty'),
    "prompts.json": (b'["a"]', r"ends in \.json"),
    "prompts": (b"a", "ends in no suffix"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_but_its_prompts_are_not_shown(tmp_path, name):
    content, seen = BAD_FILES[name]
    path = write(tmp_path, content, name)
    with pytest.raises(PromptError, match=seen) as raised:
        load(path)
    message = str(raised.value)
    assert str(path) in message
    assert "\n" not in message
    assert not any(word in message for word in SECRET.split())


def test_a_missing_file_a_folder_and_a_forbidden_one_are_told_apart(tmp_path, monkeypatch):
    with pytest.raises(PromptError, match=r"There is no prompt file .*absent\.txt"):
        load(tmp_path / "absent.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(PromptError, match=r"folder\.txt is a folder"):
        load(tmp_path / "folder.txt")

    def deny(*_: object, **__: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "locked.txt").write_text("Name a planet.")
    monkeypatch.setattr(Path, "open", deny)  # root may read everything, so mode bits do not do
    with pytest.raises(PromptError, match=r"cannot be read \(Permission denied\)"):
        load(tmp_path / "locked.txt")


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({}, "give either `path` or `dataset`"),
        ({"path": "a.txt", "dataset": "some/set"}, "give either `path` or `dataset`"),
        ({"path": "a.txt", "split": "train"}, "belong to a `dataset`, not to a `path`"),
        ({"path": "a.txt", "revision": "main", "config": "x"}, "`revision`, `config` and `split`"),
        ({"path": "a.txt", "limit": 0}, "greater than or equal to 1"),
        ({"path": "a.txt", "limit": -1}, "greater than or equal to 1"),
    ],
)
def test_a_source_that_contradicts_itself_is_refused(options, seen):
    with pytest.raises(ValueError, match=seen):
        Source(**options)


def test_plain_text_has_no_column():
    with pytest.raises(PromptError, match="plain text, which has no columns"):
        load_prompts("target", Source(path=Path("a.txt"), column="text"))


# Identity


def test_the_digest_is_of_the_canonical_json_of_the_prompts_alone():
    prompts = prompt_set("Über was?", 'a "b"\n')
    canonical = '["Über was?","a \\"b\\"\\n"]'
    assert prompts.sha256 == hashlib.sha256(canonical.encode()).hexdigest()
    assert prompts.sha256 == prompt_set(*prompts.prompts, name="other").sha256
    assert prompts.sha256 != prompt_set(*reversed(prompts.prompts)).sha256


@given(st.lists(texts, min_size=1, max_size=5), st.none() | texts, st.integers(0, 9))
def test_json_both_ways(prompts, text, dropped):
    original = PromptSet(
        name="n",
        prompts=tuple(prompts),
        source="s",
        revision=text,
        split=text,
        license=text,
        dropped=dropped,
    )
    assert STORED.validate_json(STORED.dump_json(original)) == original


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": ["another"]},
        {"prompts": None},
        {"prompts": [1]},
        {"prompts": ["\ud800"]},
        {"sha256": "0" * 64},
        {"unknown": 1},
    ],
)
def test_a_changed_artefact_is_refused(change):
    with pytest.raises(PromptError, match="'target' is damaged"):
        STORED.validate_python({**STORED.dump_python(prompt_set("a")), **change})


@pytest.mark.parametrize("missing", ["prompts", "sha256", "source"])
def test_an_artefact_without_a_field_is_refused(missing):
    data = STORED.dump_python(prompt_set("a"))
    del data[missing]
    with pytest.raises(PromptError, match="damaged"):
        STORED.validate_python(data)


def test_there_is_no_empty_set():
    with pytest.raises(PromptError, match=r"No target prompts are left of target\.txt"):
        prompt_set()


def test_a_commit_needs_no_network():
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert resolve_revision("nobody/nothing", commit) == commit


def test_the_room_opens_without_the_heavy_libraries():
    script = (
        "import sys, abliterator.prompts;"
        "print({'datasets', 'huggingface_hub', 'torch', 'yaml', 'numpy'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert shown.stdout == "set()\n", shown.stderr
