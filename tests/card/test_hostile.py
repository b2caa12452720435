"""Fields of a record that try to break the card."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from pydantic import BaseModel

from abliterator.card import escape, render_adapter_card, render_card
from abliterator.card._markdown import hide_path, yaml_fence
from abliterator.record import RunRecord
from tests.card.records import (
    COMMIT,
    PICTURES,
    SHA,
    FieldPath,
    body_of,
    demo_record,
    groups,
    header_of,
    rate,
    selection,
    side_effects,
    structure,
    tokens_of,
    tuning,
)

HOSTILE = {
    "pipe": "a|b | c\\| d",
    "backtick": "a`b``c```\n```\n# out",
    "braces": "{{ 7 * 7 }}{% for x in y %}{# #}",
    "rule": "x\n---\nlicense: evil\n---\n# owned",
    "html": "<script>alert(1)</script><!-- &lt; </code></td>",
    "right_to_left": "abc\u202egpj.exe\u2067\u200f\u0627\u0644",
    "long": "x" * 10_000,
    "everything": "a|b``` ``<td>{{ x }}\r\n\n---\n\n```\n# c\u202e | d\\",
    "long_id": "x" * 5_000 + "/" + "y" * 5_000,
    "lines": "a\r\n\r\n\u2028\u2029\x0b\x0c\x85b\n\n| - |",
    "link": "[x](https://example.org) ![y](z) https://example.org <https://example.org>",
    "control": "a\x00\x1b[31m\x7f\u200b\ufeff\ud800",
}


INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def _with(record: RunRecord, path: FieldPath, value: str) -> RunRecord:
    """A copy of the record with one field replaced, or a key of a dict (the path ends in "@")."""
    data = record.model_dump(mode="json")
    *parents, last = path
    if last == "@":
        *parents, last = parents
    here: Any = data
    for part in parents:
        here = here[part]
    if path[-1] == "@":
        here[value] = here.pop(last)
    else:
        here[last] = value
    return RunRecord.model_validate(data)


MAY_BE_LEFT_OUT = {
    "base_model",
    "base_model_relation",
    "datasets",
    "language",
    "license",
    "license_link",
    "license_name",
    "extra_gated_prompt",
    "model-index",
}


def hostile_base() -> RunRecord:
    """The demo with a Hub base, every optional field filled, and names without dots."""
    data = demo_record().model_dump()
    data["model"] |= {"id": "org/name", "revision": COMMIT, "languages": ["en"]}
    data["model"] |= {"license_name": "x", "license_link": "LICENSE"}
    data["quoted"] = [{"source": "a blog", "says": "compliance .36"}]
    data["model"]["files_sha256"] = {"weights": SHA, "config": SHA}
    data["behaviour"]["extra"] = None
    data["judge"]["prompt_sha256"] = SHA
    data["model"]["gating"] = {
        "extra_gated_prompt": "Be kind.",
        "extra_gated_fields": {"Name": "text", "Country": {"type": "country"}},
    }
    data["judge"] |= {"model": "judge-1", "served_model": "judge-1-0926", "structured": "schema"}
    data["judge"] |= {"fingerprints": ["fp_1"], "base_url": "http://localhost", "kind": "openai"}
    data["judge"] |= {"calibration": {"labels": "XSTest"}}
    data["judge"]["disagreement"] = {"rules": rate(0.1).model_dump()}
    data["tuning"] = tuning()
    data["edit"]["strength"]["expert"] = {"9-24": 0.6}
    data["selection"] = selection()
    data["groups"] = groups()
    data["side_effects"] = side_effects()
    data["pictures"] = {**PICTURES, "abliterator/other": SHA}
    data["provenance"] |= {"git_commit": COMMIT, "hardware": "x", "digests": {"directions": SHA}}
    return RunRecord.model_validate(data)


def _texts(value: Any, path: FieldPath = ()) -> Iterator[FieldPath]:
    """Where free text stands in a record: every string, and every key that no type fixes."""
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _texts(getattr(value, name), (*path, name))
    elif isinstance(value, dict):
        for key, inner in value.items():
            if path and (*path, key) not in MEANT:
                yield (*path, key, "@")
            yield from _texts(inner, (*path, key))
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _texts(inner, (*path, index))
    elif isinstance(value, str) and path not in MEANT:
        yield path


GROUPED = ("refusal", "compliance")
# Texts that select what is shown, so that another one is meant to change the structure.
MEANT = {
    *(("behaviour", name) for name in ("target", "neutral", "over_refusal")),
    *(("pictures", name) for name in PICTURES),
    ("judge", "kind"),
    *(("side_effects", "target", *more) for more in ((), ("words",))),
    ("groups", "target"),
    *(("groups", "target", 0, "overall", name) for name in GROUPED),
    *(
        ("groups", "target", 0, "groups", i, *more)
        for i in (0, 1)
        for more in (
            *(("measures", name) for name in GROUPED),
            *(("kinds", side, *kind) for side in ("base", "edited") for kind in ((), ("refused",))),
        )
    ),
}
FREE_TEXT = list(_texts(hostile_base()))
RENDERERS = {"checkpoint": render_card, "adapter": render_adapter_card}


@cache
def benign_card(path: FieldPath, of: str) -> str:
    return RENDERERS[of](_with(hostile_base(), path, "benign"))


def skeleton(card: str) -> list[str]:
    """The tags of the body as HTML, as a browser meets them."""
    tags: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, _: tags.append(tag)
    parser.handle_endtag = lambda tag: tags.append(f"/{tag}")
    parser.feed(MarkdownIt("commonmark").enable("table").render(body_of(card)))
    return tags


def test_the_attacks_meet_every_text_of_a_record():
    assert len(FREE_TEXT) > 80
    fields = {path[:2] for path in FREE_TEXT}
    assert {("judge", "served_model"), ("judge", "fingerprints"), ("edit", "components")} <= fields
    assert {path[0] for path in FREE_TEXT} >= {"benchmarks", "selection", "quoted", "provenance"}


@pytest.mark.parametrize(
    ("of", "attack"),
    [("checkpoint", "everything"), ("checkpoint", "long"), ("adapter", "everything")],
)
@pytest.mark.parametrize("path", FREE_TEXT, ids=lambda path: ".".join(map(str, path)))
def test_hostile_field_leaves_the_structure_alone(path: FieldPath, of: str, attack: str):
    benign = benign_card(path, of)
    card = RENDERERS[of](_with(hostile_base(), path, HOSTILE[attack]))

    assert structure(card) == structure(benign)
    assert skeleton(card) == skeleton(benign)
    header, expected = header_of(card), header_of(benign)
    for shown in (header, expected):
        for index in shown.get("model-index", []):  # made of the base's id where that is one
            assert re.fullmatch(r"[\w.-]{1,110}", index.pop("name"))
        for key in [key for key in shown if key.startswith("extra_gated_")]:
            # the one free text of the header, for the Hub's form: a licence may be in it
            assert isinstance(shown.pop(key), (str, dict))
    assert header == {key: expected[key] for key in header}
    assert set(expected) - set(header) <= MAY_BE_LEFT_OUT
    outside_recipe = body_of(card).rpartition("\n## Recipe\n")[0]
    assert max(map(len, outside_recipe.splitlines())) < 1100
    assert not INVISIBLE.search(card)
    card.encode("utf-8")
    assert "<script" not in outside_recipe
    assert "{{" not in outside_recipe


@pytest.mark.parametrize("attack", HOSTILE)
@pytest.mark.parametrize("of", RENDERERS)
def test_all_fields_hostile_at_once(attack: str, of: str):
    record, benign = hostile_base(), hostile_base()
    for path in FREE_TEXT:
        if "@" not in path:
            record, benign = _with(record, path, HOSTILE[attack]), _with(benign, path, "benign")
    card, other = RENDERERS[of](record), RENDERERS[of](benign)
    assert structure(card) == structure(other)
    assert skeleton(card) == skeleton(other)


def test_the_same_attacks_unescaped_do_break_the_structure():
    """The negative: `structure` notices what the tests above rule out."""
    benign = render_card(hostile_base())
    whole = structure(benign)
    broken = {name for name, text in HOSTILE.items() if _unescaped(benign, text) != whole}
    assert broken >= {"pipe", "backtick", "rule", "html", "lines", "link", "everything"}


def _unescaped(card: str, text: str) -> list[tuple[str, str]]:
    return structure(card.replace("| Device | `cpu` |", f"| Device | {text} |"))


@given(st.text())
def test_escape_is_one_code_span_in_one_cell(text: str):
    span = escape(text)
    assert len(span) <= 10 * 100 + 2
    cells = [
        token
        for token in tokens_of(f"| a | b |\n|---|---|\n| {span} | end |\n")
        if token.type == "inline"
    ]
    assert [cell.content for cell in cells[:2]] == ["a", "b"]
    kinds = [[child.type for child in cell.children] for cell in cells[2:]]
    assert kinds == [["text" if span == "(empty)" else "code_inline"], ["text"]]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Qwen/Qwen-1_8B-Chat", "`Qwen/Qwen-1_8B-Chat`"),
        ("train[:400]", "`train[:400]`"),
        ("a|b", r"`a\x7cb`"),
        ("a`b", r"`a\x60b`"),
        ("a\\x60", r"`a\x5cx60`"),
        ("{{ a }}", r"`\x7b\x7b a \x7d\x7d`"),
        ("a\n\n---\nb", "`a --- b`"),
        ("\u202eabc", r"`\u202eabc`"),
        ("données 提示", "`données 提示`"),
        ("\u05d0b", r"`\u05d0b`"),
        ("", "(empty)"),
        (" \n", "(empty)"),
        ("/home/someone/x.yaml", "`x.yaml`"),
        ("x" * 101, f"`{'x' * 99}…`"),
    ],
)
def test_escape(text: str, shown: str):
    assert escape(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/someone/model", "model"),
        ("/home/someone/model/", "model"),
        ("~/models/x", "x"),
        ("~someone/models/x", "x"),
        ("../secret/x.jsonl", "x.jsonl"),
        ("C:\\Users\\someone\\x", "x"),
        ("\\\\server\\share\\x", "x"),
        ("file:///home/someone/x", "x"),
        ("org/name", "org/name"),
        ("embedded:demo", "embedded:demo"),
        ("arc_easy", "arc_easy"),
    ],
)
def test_hide_path(text: str, shown: str):
    assert hide_path(text) == shown


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.lists(st.text())))
def test_the_recipe_reads_back_out_of_its_fence(values: dict[str, Any]):
    fences = [token for token in tokens_of(yaml_fence(values)) if token.type == "fence"]
    assert len(fences) == 1
    assert yaml.safe_load(fences[0].content) == values
