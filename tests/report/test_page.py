"""What is in the page, and that text of models stays text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abliterator.record import Estimate
from abliterator.report import render_report
from abliterator.report._data import inert_json
from abliterator.report._models import model_rows
from abliterator.report._page import SCRIPTS, number
from tests.report.builds import HOSTILE, Page, build

OURS = [name for name in SCRIPTS if "/" not in name]


def script(name: str) -> str:
    return (files("abliterator.report") / name).read_text("utf-8")


def test_text_of_models_does_not_change_the_structure_of_the_page():
    benign, hostile = (Page(render_report([build(text=text)])) for text in ("plain", HOSTILE))
    assert hostile.tags == benign.tags
    assert [(tag, name) for tag, name, _ in hostile.attributes] == [
        (tag, name) for tag, name, _ in benign.attributes
    ]
    shown = json.loads(hostile.data)["builds"][0]["answers"]["target"][1]
    assert shown["prompt"] == f"prompt 1 {HOSTILE}"
    assert shown["edited"]["text"] == f"yes 1 {HOSTILE}"
    assert shown["edited"]["thinking"] == f"thought {HOSTILE}"


def test_the_same_text_unescaped_does_change_it():
    """The negative: the comparison above notices what it rules out."""
    page = render_report([build()])
    assert Page(page.replace("k = 1", HOSTILE, 1)).tags != Page(page).tags


@given(st.text())
def test_json_is_inert_and_reads_back(text: str):
    shown = inert_json({"text": text})
    assert not set(shown) & set("<>&\u2028\u2029")
    assert shown.isascii()
    assert json.loads(shown) == {"text": text}


def test_nothing_is_loaded_and_nothing_but_our_scripts_runs():
    page = Page(render_report([build(), build("other")]))
    for tag, name, value in page.attributes:
        assert name not in ("src", "srcset", "style"), tag
        assert not name.startswith("on"), tag
        if name == "href":
            assert value.startswith("#")
    (policy,) = [
        value for _, name, value in page.attributes if name == "content" and "-src" in value
    ]
    assert "default-src 'none'" in policy
    hashes = set(re.findall(r"sha256-[\w+/=]+", policy))
    run = [text for attributes, text in page.scripts if "type" not in attributes and text.strip()]
    assert len(run) == len(SCRIPTS)
    assert hashes == {
        "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in run
    }
    assert not re.search(r"@import|url\(", script("report.css"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_stand_in_html_as_they_are(name: str):
    assert not re.search(r"</script|<!--", script(name), re.IGNORECASE)


@pytest.mark.parametrize("name", OURS)
def test_scripts_put_text_on_the_page_as_text(name: str):
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|Function\(|fetch\("
    )
    assert not re.search(forbidden, script(name))


def test_the_page_has_what_was_measured():
    page = Page(render_report([build()]))
    text = " ".join("".join(page.texts).split())
    record = build().record
    for side in ("base", "edited", "delta"):
        for _, estimate in getattr(record.behaviour["target"], side):
            if estimate is not None:
                form = "+.3f" if side == "delta" else ".3f"
                assert number(estimate.value, form) in text
    assert number(record.divergence.kl_first_token.value) in text
    assert "Private." in text
    assert "knitting: refusal 0.900, of all 0.500" in text
    assert "knitting, 18 of 20" in text
    assert "Length of an answer, wordsTarget prompts60.5 51.5 −9.0 [−13.0, −5.0]63 of 64" in text
    ids = {value for _, name, value in page.attributes if name == "id"}
    links = [value[1:] for _, name, value in page.attributes if name == "href"]
    assert set(links) <= ids
    assert len([tag for tag in page.tags if tag == "h1"]) == 1


def test_the_data_has_every_pair_gate_tensor_and_the_record():
    (shown,) = json.loads(Page(render_report([build(n=5)])).data)["builds"]
    assert len(shown["answers"]["target"]) == 5
    assert [row.get("groups") for row in shown["answers"]["target"][:2]] == [
        None,
        {"category plain": "knitting"},
    ]
    assert shown["answers"]["target"][0]["base"]["rules"] == "partial"
    assert "rules" not in shown["answers"]["target"][1]["base"]
    assert shown["gates"] == {"max_kl": 0.1, "min_induce": 0.0}
    (tensor,) = shown["tensors"]
    assert (tensor["change"], round(tensor["off"], 9)) == (0.25, 1e-7)
    assert shown["flipped"] == {"task plain": [[3, "none plain", 0.0, 1.0, -2.0, -0.5]]}
    assert shown["record"] == build().record_text
    assert [trial["selected"] for trial in shown["tuning"]] == [False, True]


def test_every_field_has_a_label():
    """An input without a label is no use to a screen reader."""
    page = Page(render_report([build()]))
    opened = 0
    for tag in page.tags:
        opened += {"label": 1, "/label": -1}.get(tag, 0)
        assert opened or tag not in ("input", "select")


def with_compliance(name: str, k: int, value: float, low: float, high: float):
    made = build(name, model="org/m")
    record = made.record.model_copy(
        update={
            "selection": None,
            "edit": made.record.edit.model_copy(update={"k": k}),
        }
    )
    target = record.behaviour["target"]
    rate = Estimate(value=value, low=low, high=high, n=100)
    edited = target.edited.model_copy(update={"compliance": rate})
    behaviour = {"target": target.model_copy(update={"edited": edited})}
    record = record.model_copy(update={"behaviour": behaviour})
    return type(made)(name=name, record_text=record.model_dump_json())


@pytest.mark.parametrize(
    ("one", "sufficient"),
    [((0.2, 0.13, 0.29), "no"), ((0.5, 0.40, 0.60), "yes"), (None, "not measured")],
)
def test_a_single_direction_is_sufficient_unless_the_intervals_are_apart(one, sufficient: str):
    builds = [with_compliance("k3", 3, 0.6, 0.5, 0.69)]
    builds += [with_compliance("k1", 1, *one)] if one else []
    (row,) = model_rows(builds)
    assert (row.sufficient, row.best.edit.k, row.builds) == (sufficient, 3, len(builds))
    assert "0.600" in "".join(Page(render_report([*builds, build()])).texts)


@pytest.mark.parametrize(
    ("value", "form", "shown"),
    [
        (-0.0001, "+.3f", "0.000"),
        (0.0, ".3f", "0.000"),
        (-0.5, "+.3f", "−0.500"),
        (2e-56, ".2g", "2e−56"),
        (1234.5, ",.2f", "1,234.50"),
        (None, ".3f", "–"),
    ],
)
def test_number(value: float | None, form: str, shown: str):
    assert number(value, form) == shown
