"""What a card says of base, licence, judge and origin."""

from __future__ import annotations

import re

import pytest
import yaml

from abliterator.card import render_card
from abliterator.record import Quotation
from tests.card.records import (
    demo_record,
    header_of,
    hub_record,
)


def test_a_named_licence_is_carried_with_its_text():
    model = demo_record().model.model_copy(
        update={"license": "other", "license_name": "tongyi-qianwen", "license_link": "LICENSE"}
    )
    card = render_card(demo_record().model_copy(update={"model": model}))
    header = header_of(card)
    assert [header[f"license{part}"] for part in ("", "_name", "_link")] == [
        "other",
        "tongyi-qianwen",
        "LICENSE",
    ]
    assert "| Its name | `tongyi-qianwen` |" in card


@pytest.mark.parametrize(
    ("license_id", "says"),
    [
        ("llama3.2", "**Built with Llama.** Llama 3.2 is licensed under the Llama 3.2 Community"),
        ("llama3", 'begins its name with "Llama 3"'),
        ("llama2", "Llama 2 is licensed under the LLAMA 2 Community License"),
        ("gemma", "Gemma Terms of Use found at ai.google.dev/gemma/terms"),
        ("apache-2.0", None),
        (None, None),
    ],
)
def test_what_a_licence_asks_for_is_on_the_card(license_id: str | None, says: str | None):
    model = hub_record().model.model_copy(update={"license": license_id})
    card = render_card(hub_record().model_copy(update={"model": model}))
    asked = ("Community License", "Gemma Terms")
    assert any(text in card for text in asked) == (says is not None)
    assert says is None or says in card


def test_reports_of_others_are_said_to_be_theirs():
    record = hub_record()
    assert "## What others report" not in render_card(record)
    quoted = (Quotation(source="a|blog", says="compliance .36 on 100 prompts"),)
    card = render_card(record.model_copy(update={"quoted": quoted}))
    section = card.partition("## What others report")[2].partition("\n## ")[0]
    assert "Not measured by this tool" in section
    assert "| `a\\x7cblog` | `compliance .36 on 100 prompts` |" in section


def test_a_planned_edit_is_said_to_be_planned():
    empty = {"tensors": None, "output_bytes": None, "edited_bytes": None, "layers": ()}
    edit = hub_record().edit.model_copy(update=empty)
    card = render_card(hub_record().model_copy(update={"edit": edit}))
    assert "nothing was built, and nothing was measured" in card
    assert "Left to a sweep" in card
    assert "Tensors edited" not in card
    assert "None" not in card
    assert "nothing was built" not in render_card(hub_record())


def test_a_local_base_is_no_hub_id():
    header = header_of(render_card(demo_record()))
    assert "base_model" not in header
    assert "base_model_relation" not in header
    assert header["license"] == "apache-2.0"


@pytest.mark.parametrize("identity", ["/home/someone/models/my-base", "someone/models/my-base"])
def test_a_local_folder_is_shown_by_its_last_name(identity: str):
    record = demo_record()
    model = record.model.model_copy(update={"id": identity})
    card = render_card(
        record.model_copy(update={"model": model, "recipe": {"model": "/home/someone/my-base"}})
    )
    assert "someone" not in card
    assert "# `my-base`, abliterated" in card
    assert yaml.safe_load(re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)[0]) == {
        "model": "my-base"
    }


def test_a_system_prompt_that_looks_like_a_path_is_kept():
    assert "system: /no_think\n" in render_card(demo_record())
