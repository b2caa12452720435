"""What quantisation leaves of an edit, as a card says it."""

from __future__ import annotations

import re

from abliterator.card import render_adapter_card, render_card
from abliterator.record import Divergence, RunRecord, Survival, SurvivingStrength
from tests.card.records import demo_record, rate, target_behaviour, tokens_of

HEADING = "## What quantisation leaves"


def survival(name: str, **changes) -> Survival:
    behaviour = target_behaviour()
    entry = Survival(
        format=name,
        label=f"{name}, a scale a row",
        tool="compressed-tensors 0.20.0",
        commands=(f"abliterator survive OUT --as {name} --keep",),
        answered_by="transformers",
        bytes=1_250_000_000,
        bytes_built=2_500_000_000,
        built=behaviour,
        behaviour=behaviour.model_copy(update={"edited": behaviour.base}),
        change={"base": behaviour.delta, "edited": behaviour.delta},
        divergence=Divergence(kl=rate(0.4567)),
        rounding={"base": Divergence(kl=rate(0.0321)), "edited": Divergence(kl=rate(0.0766))},
        strengths=(
            SurvivingStrength(
                component="attention",
                blocks=30,
                built=1.0,
                low=0.881,
                median=0.992,
                high=1.013,
                leak_built=0.0012,
                leak=0.234,
                leak_high=0.346,
            ),
        ),
    )
    return entry.model_copy(update=changes)


def record(*entries: Survival) -> RunRecord:
    return demo_record().model_copy(update={"survival": entries})


def section(card: str) -> str:
    return card.partition(HEADING)[2].partition("\n## ")[0]


def test_every_figure_of_a_format_is_on_both_cards():
    for render in (render_card, render_adapter_card):
        shown = section(render(record(survival("fp8"))))
        figures = ["| `fp8` | 1.25 |", "| as built | 2.50 |", "0.457", "0.032", "0.077", "-0.969"]
        figures += ["0.881, 0.992, 1.013", "| 0.0012 | 0.23 | 0.35 |", "0.984<br>", "| 64 |"]
        figures += ["`compressed-tensors 0.20.0`", "`abliterator survive OUT --as fp8 --keep`"]
        assert [text for text in figures if text not in shown] == []


def test_tables_are_tables_and_each_number_of_prompts_has_a_row_as_built():
    few = survival("int4")
    side = few.behaviour.edited.model_copy(update={"truncated": rate(0.0, n=7)})
    few = few.model_copy(update={"behaviour": few.behaviour.model_copy(update={"edited": side})})
    card = render_card(record(survival("fp8"), survival("Q8_0"), few))
    tables = [token for token in tokens_of(section(card)) if token.type == "table_open"]
    assert len(tables) == len(re.findall(r"^\|(?:---\|)+$", section(card), re.MULTILINE)) == 4
    first = re.findall(r"^\| (as built|`\w+`) \| [\d.]+ .* \| (\d+) \|$", section(card), re.M)
    assert first == [
        ("as built", "64"),
        ("`fp8`", "64"),
        ("`Q8_0`", "64"),
        ("as built", "7"),
        ("`int4`", "7"),
    ]


def test_what_could_not_be_read_back_says_so():
    entry = survival("Q8_0", divergence=None, rounding={}, strengths=(), withheld="why")
    shown = section(render_card(record(entry)))
    assert "KL and strengths were not measured" in shown
    assert "| n/a |" in shown


def test_a_card_without_formats_says_that_they_were_not_measured():
    card = render_card(demo_record())
    assert HEADING not in card
    assert "- What quantised files (GGUF, FP8, int4) keep of the edit." in card
    measured = render_card(record(survival("fp8")))
    assert "- What quantised files (GGUF" not in measured
