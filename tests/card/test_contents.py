"""What a card says: golden texts, its header, what was measured and what was not.

After a wanted change of the template or of `demo_record`, rewrite the golden files and read the
difference:

    ABLITERATOR_REGENERATE_GOLDEN=1 pytest tests/card
"""

from __future__ import annotations

import os
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from abliterator.card import render_adapter_card, render_card
from abliterator.record import (
    CalibrationSummary,
    Estimate,
    JudgeIdentity,
    QuantizedEdits,
    Quotation,
    RunRecord,
)
from tests.card.records import (
    COMMIT,
    GOLDEN,
    PICTURES,
    ROOT,
    SHA,
    body_of,
    demo_record,
    groups,
    header_of,
    hub_record,
    rate,
    selection,
    side_effects,
    tokens_of,
    tuning,
)


@pytest.mark.parametrize(
    ("name", "render", "make"),
    [
        ("card_demo.md", render_card, demo_record),
        ("card_not_measured.md", render_card, hub_record),
        ("card_adapter.md", render_adapter_card, hub_record),
    ],
)
def test_card_is_the_golden_text(
    name: str, render: Callable[[RunRecord], str], make: Callable[[], RunRecord]
):
    card = render(make())
    path = GOLDEN / name
    if os.environ.get("ABLITERATOR_REGENERATE_GOLDEN"):
        path.write_text(card, encoding="utf-8")
    assert card == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("components", [("attention",), ("attention", "embedding")])
def test_what_an_edit_of_several_streams_promises_is_said(components):
    record = demo_record()
    edit = record.edit.model_copy(update={"components": components})
    model = record.model.model_copy(update={"several_streams": True})
    card = render_card(record.model_copy(update={"model": model, "edit": edit}))
    assert "**Nothing is promised of the streams themselves.**" in card
    assert ("part, which was not edited" in card) == ("embedding" not in components)
    assert "streams" not in render_card(record)


def test_model_cards_are_what_their_command_writes():
    """After a wanted change: python scripts/render_cards.py, and read the difference."""
    script = runpy.run_path(str(ROOT / "scripts" / "render_cards.py"))
    cards = dict(script["cards"]())
    folder = ROOT / "model_cards"
    assert cards == {path.name: path.read_text("utf-8") for path in folder.glob("*.md")}
    assert "demo.md" in cards


def test_a_card_that_quotes_the_replication_claims_nothing():
    """A record of a recipe that was not run: what the recipe asks for, and no measurement."""
    replication = "about .36 compliance on 100 prompts, where the best single layer had .21."
    quoted = (Quotation(source="the replication, judged by an LLM", says=replication),)
    record = hub_record()
    never = {"tensors": None, "max_leak": None, "median_leak": None}
    edit = record.edit.model_copy(update={**never, "output_bytes": None, "edited_bytes": None})
    card = render_card(record.model_copy(update={"quoted": quoted, "edit": edit}))
    assert "about .36 compliance on 100 prompts" in card.partition("## What others report")[2]
    assert card.count("\nNot measured.\n") == 5
    assert "model-index" not in header_of(card)


@pytest.mark.parametrize("path", sorted((ROOT / "model_cards").glob("*.md")), ids=lambda p: p.stem)
def test_model_cards_parse_and_their_tables_are_tables(path: Path):
    card = ModelCard.load(path)
    assert card.data.to_dict() == header_of(path.read_text("utf-8"))
    tables = [token for token in tokens_of(card.text) if token.type == "table_open"]
    rules = re.findall(r"^\|(?:---\|)+$", card.text, re.MULTILINE)
    assert len(tables) == len(rules) > 2


def test_strengths_of_blocks_are_pairs_and_no_code():
    record = demo_record()
    strength = {"attention": 1.0, "mlp": {"9-24": 0.4, "30": 1.0}}
    edit = record.edit.model_copy(update={"strength": strength})
    card = render_card(record.model_copy(update={"edit": edit}))
    (row,) = [line for line in card.splitlines() if line.startswith("| Strength s")]
    assert "| `attention` 1.0, `mlp` (`30` 1.0, `9-24` 0.4) (by blocks, counted from 0;" in row


def test_card_is_made_from_json_alone():
    record = demo_record()
    again = RunRecord.model_validate_json(record.model_dump_json())
    assert render_card(again) == render_card(record)


def test_header_is_what_the_hub_reads():
    card = render_card(hub_record())
    data = ModelCard(card).data.to_dict()
    assert data == header_of(card)
    assert data == {
        "base_model": "meta-llama/Llama-3.2-1B-Instruct",
        "base_model_relation": "finetune",
        "datasets": ["mlabonne/harmless_alpaca"],
        "language": ["en", "de"],
        "library_name": "transformers",
        "license": "llama3.2",
        "pipeline_tag": "text-generation",
        "tags": ["abliterated", "abliterator", "not-for-all-audiences"],
    }


def test_the_header_of_an_adapter_says_what_it_is_and_claims_no_results():
    data = ModelCard(render_adapter_card(hub_record())).data.to_dict()
    assert data["base_model_relation"] == "adapter"
    assert data["library_name"] == "peft"
    assert "lora" in data["tags"]
    record = demo_record()
    assert ModelCard(render_adapter_card(record)).data.eval_results is None
    assert "0.946 [0.910, 0.968]" in render_adapter_card(record)  # but the card has them


def test_empty_and_cut_answers_have_columns_of_their_own():
    record = demo_record()
    choice = record.benchmarks["toy_facts"]
    rates = {
        "empty_base": rate(0.0, 0.0, 0.016, 240),
        "empty_edited": rate(0.125, 0.089, 0.173, 240),
        "truncated_base": None,
        "truncated_edited": None,
    }
    said = choice.model_copy(
        update={**rates, "p_value": 3e-5, "p_holm": 0.031, "gold_loglik": None, "gained": None}
    )
    assert "| Empty, base |" not in render_card(record)
    both = record.model_copy(update={"benchmarks": {"toy_facts": choice, "toy_sums": said}})
    card = render_card(both)
    row = "| `toy_sums` | 0.000 [0.000, 0.016] | 0.125 [0.089, 0.173] | n/a | n/a |"
    (header,) = [part for part in card.split("\n\n") if row in part]
    assert header.startswith("| Task | Empty, base | Empty, edited |")
    assert "toy_facts" not in header
    assert "| `toy_sums` | 0.012 | n/a | < 0.0001 | 0.031 | n/a |" in card
    assert "| `toy_facts` | 0.012 | 1, 2 | 1 | 1 | -0.021 [-0.031, -0.012] |" in card


def test_benchmarks_are_in_the_header_with_their_error_and_n():
    """Round trip through the Hub's own reader."""
    data = ModelCard(render_card(demo_record())).data
    (result,) = data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == (
        "toy_facts",
        "acc",
        0.9458,
    )
    assert result.metric_args == {"n": 240, "stderr": 0.0146}  # sqrt(.9458 x .0542 / 239)
    assert ModelCard(render_card(hub_record())).data.eval_results is None


@pytest.mark.parametrize(
    ("change", "stderr"),
    [
        ({"gained": None}, 0.0149),  # no rate: half of the bootstrap's interval, by 1.96
        ({"edited": rate(1.0, 0.984, 1.0, 240)}, None),  # all right: an error of 0 says too much
        ({"edited": rate(1.0, None, None, 1)}, None),
    ],
)
def test_the_error_in_the_header_is_measured_or_left_out(change: dict[str, Any], stderr: float):
    result = demo_record().benchmarks["toy_facts"].model_copy(update=change)
    card = render_card(demo_record().model_copy(update={"benchmarks": {"toy_facts": result}}))
    (shown,) = ModelCard(card).data.eval_results
    assert shown.metric_args.get("stderr") == stderr


def test_what_a_gated_base_asks_of_its_users_is_asked_again():
    gating = {
        "extra_gated_prompt": "### TERMS\n---\nlicense: mit\n---\nBe \u202ekind.",
        "extra_gated_fields": {
            "Name": "text",
            "Country": {"type": "country"},
            "I agree": "checkbox",
        },
        "extra_gated_button_content": "Submit",
        "extra_gated_heading": 7,
        "extra_gated_else": "left out",
    }
    model = hub_record().model.model_copy(update={"gating": gating})
    card = ModelCard(
        render_card(hub_record().model_copy(update={"model": model})), ignore_metadata_errors=False
    )
    data = card.data.to_dict()
    assert data["extra_gated_prompt"] == "### TERMS\n---\nlicense: mit\n---\nBe kind."
    assert data["extra_gated_fields"] == gating["extra_gated_fields"]
    assert data["extra_gated_button_content"] == "Submit"
    assert data["license"] == "llama3.2"
    assert not {"extra_gated_heading", "extra_gated_else"} & data.keys()
    assert card.text.lstrip().startswith("# `Llama")


def test_the_structure_is_told_and_the_pictures_are_shown_where_there_are_any():
    record = demo_record().model_copy(update={"selection": selection()})
    told = render_card(record)
    assert "Structure of the behaviour in this model: `low-rank subspace`." in told
    assert "participation ratio of 1.60" in told
    images = [token.type for token in tokens_of(body_of(told)) if token.type == "image"]
    assert images == []
    shown = render_card(record.model_copy(update={"pictures": PICTURES}))
    images = [token for token in tokens_of(body_of(shown)) if token.type == "image"]
    assert [image.attrs["src"] for image in images] == list(PICTURES)
    assert all(image.content for image in images)  # told in words where it cannot be seen


def test_what_is_withheld_of_candidates_and_trials_is_not_a_number():
    """Where over 2 % of the answers have no verdict."""
    unknown = dict.fromkeys(("refusal", "compliance", "coherence", "product"))
    _, judged = selection().candidates
    answers = judged.answers.model_copy(update=unknown)
    found = selection().model_copy(
        update={"candidates": (judged.model_copy(update={"answers": answers}),)}
    )
    start, tuned = tuning().trials
    trials = (start.model_copy(update=unknown), tuned)
    told = tuning().model_copy(update={"trials": trials})
    card = render_card(demo_record().model_copy(update={"selection": found, "tuning": told}))
    assert "| 3 | -1.000 | 0.010 | 2.000 | withheld | withheld | withheld |  |" in card
    assert "|  | withheld | withheld |  | 0.0123 | 0.0234 |" in card
    assert "| **taken** | 0.100 | 0.900 | 64 | 0.0123 | 0.0234 |" in card


@pytest.mark.parametrize(
    ("dequantized", "says"), [(False, "Kept in this format"), (True, "Written as bfloat16")]
)
def test_what_quantised_tensors_became_is_on_the_card(dequantized: bool, says: str):
    edits = QuantizedEdits(
        format="MXFP4",
        tensors=24,
        dequantized=dequantized,
        max_leak=4.7e-3,
        noise=0.0453,
        noise_nearest=0.0212,
    )
    edit = demo_record().edit.model_copy(update={"quantized": (edits,)})
    card = render_card(demo_record().model_copy(update={"edit": edit}))
    assert (
        f"| `MXFP4`: 24 edited tensors | {says}; leak at most 4.7e-03, rounding noise 4.5e-02 of "
        "the weights (2.1e-02 by plain rounding) |"
    ) in card
    assert "MXFP4" not in render_card(demo_record())


def test_the_lock_is_on_the_card():
    lock = {"hardware": "AVX2, 2 threads", "digests": {"directions": SHA}}
    provenance = demo_record().provenance.model_copy(update=lock)
    card = render_card(demo_record().model_copy(update={"provenance": provenance}))
    assert "| Hardware | `AVX2, 2 threads` |" in card
    assert f"| sha256 of `directions` | `{SHA}` |" in card


def test_what_was_not_measured_says_so():
    card = render_card(hub_record())
    sections = dict(re.findall(r"^#{2,3} (.*?)\n\n(.*?)(?=\n#)", card, re.DOTALL | re.MULTILINE))
    for name in ("Divergence", "Benchmarks"):
        assert sections[name].strip() == "Not measured."
    assert card.count("\nNot measured.\n") == 5  # three prompt sets, divergence, benchmarks
    measured = card.partition("## Behaviour")[2].partition("## Intended")[0]
    assert not re.search(r"\d\.\d{3}", measured)


def test_an_estimate_that_is_missing_is_not_zero():
    card = render_card(demo_record())
    zero = "0.000 [0.000, 0.057], n 64"
    assert f"| Unscored | {zero} | {zero} | Not measured |" in card
    assert "| Coherence (0, 0.5 or 1) | 1.000, n 64 | 0.992 [0.977, 1.000], n 64 |" in card


def test_numbers_of_the_rule_judge_are_called_so():
    card = render_card(demo_record())
    assert card.count("| Measure (rule judge) | Base | Edited | Delta |") == 2
    assert "a rule judge: phrase and repetition rules, no model" in card
    assert "uncalibrated" in card


def test_groups_are_on_the_card_and_one_that_differs_in_the_result():
    card = render_card(demo_record().model_copy(update={"groups": groups()}))
    result, _, rest = card.partition("## How to load and serve it")
    assert (
        "**Groups differ.** Refusal of the edited model on target prompts is 0.900 [0.699, 0.972], "
        "n 19 of 20 for `category` `knitting`, and 0.500 for all."
    ) in result
    row = (
        "| `knitting` | Refusal | 1.000 [0.839, 1.000] | 0.900 [0.699, 0.972] | -0.100 | 19 of 20 |"
    )
    assert row in rest
    assert "By `category` (prompts without one: 1):" in rest
    assert "Refusals that remain: `knitting` 18 of 20, `tea` 2 of 20." in rest
    kinds = "`knitting` (`refused` 18), `tea` (`refused` 2)"
    assert f"Verdicts on the edited model: {kinds}." in rest
    tables = [t for t in tokens_of(body_of(card)) if t.type == "table_open"]
    assert len(tables) == 1 + len(
        [t for t in tokens_of(body_of(render_card(demo_record()))) if t.type == "table_open"]
    )


def test_a_card_without_groups_does_not_speak_of_them():
    assert "roups" not in render_card(demo_record()).replace("groups of", "")


def test_side_effects_have_a_line_each_and_what_is_missing_says_so():
    card = render_card(demo_record().model_copy(update={"side_effects": side_effects()}))
    line = "| Length of an answer, words | target prompts | 60.5 | 51.5 | -9.0 [-13.0, -5.0] |"
    assert f"{line} 63 of 64 |" in card
    assert "| Calibration error of choices | | Not measured | | | |" in card
    assert "- The model's own confidence against how often it is right." in card
    assert "- Length of answers, their language" not in card
    assert "- Length of answers, their language" in render_card(demo_record())


def test_how_many_were_asked_stands_beside_how_many_were_scored():
    record = demo_record()
    target = record.behaviour["target"]
    edited = target.edited.model_copy(
        update={"refusal": Estimate(value=0.1, low=0.0, high=0.2, n=98, asked=100)}
    )
    behaviour = {"target": target.model_copy(update={"edited": edited})}
    card = render_card(record.model_copy(update={"behaviour": behaviour}))
    assert "| 98 of 100 |" in card
    assert "0.100 [0.000, 0.200], n 98 of 100" in card


def test_another_judge_is_named_with_its_calibration():
    judge = JudgeIdentity(
        kind="openai",
        model="judge-1",
        prompt_sha256=SHA,
        version="2",
        calibration=CalibrationSummary(n=300, kappa=0.81),
    )
    card = render_card(demo_record().model_copy(update={"judge": judge}))
    assert "rule judge" not in card
    assert "uncalibrated" not in card
    assert "`kappa` 0.81, `n` 300" in card
    assert "| Measure (judge `openai`) | Base | Edited | Delta |" in card


def test_remote_code_is_loaded_as_such():
    record = demo_record()
    assert "trust_remote_code" not in render_card(record)
    recipe = {**record.recipe, "trust_remote_code": True}
    assert render_card(record.model_copy(update={"recipe": recipe})).count("=True)") == 2 + 1


@pytest.mark.parametrize("render", [render_card, render_adapter_card])
@pytest.mark.parametrize("make", [demo_record, hub_record])
def test_the_loading_snippet_is_python(render: Callable[[RunRecord], str], make):
    for remote in (False, True):
        recipe = {**make().recipe, "trust_remote_code": remote}
        card = render(make().model_copy(update={"recipe": recipe}))
        compile(re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0], "snippet", "exec")


def test_every_number_of_the_record_is_in_the_card():
    """A template that drops a column would still look like a card."""
    card = render_card(demo_record())
    shown = ["3.2e-05", "1.1e-05", "2,345,678", "786,432", "`mlp` 0.8", "3, 2", "-1", "0.012"]
    shown += ["-0.969 [-1.000, -0.922], n 64", "-0.004 [-0.013, 0.000]", "| 240 |", COMMIT, SHA]
    assert [text for text in shown if text not in card] == []
