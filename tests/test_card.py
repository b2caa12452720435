"""The card: golden text, what was not measured, and fields that try to break it.

After a wanted change of the template or of `demo_record`, rewrite the golden files and read the
difference:

    ABLITERATOR_REGENERATE_GOLDEN=1 pytest tests/test_card.py
"""

from __future__ import annotations

import os
import re
import runpy
from collections.abc import Callable, Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from pydantic import BaseModel

from abliterator.card import escape, render_adapter_card, render_card
from abliterator.card._markdown import hide_path, yaml_fence
from abliterator.record import (
    Behaviour,
    BehaviourSide,
    BenchmarkResult,
    Divergence,
    EditSummary,
    Estimate,
    JudgeIdentity,
    ModelIdentity,
    PromptOrigin,
    Provenance,
    QuantizedEdits,
    Quotation,
    RunRecord,
    Tool,
)

ROOT = Path(__file__).parents[1]
FieldPath = tuple[str | int, ...]
GOLDEN = ROOT / "tests" / "golden"
SHA = "0123456789abcdef" * 4
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def rate(value: float, low: float | None = None, high: float | None = None, n: int = 64):
    return Estimate(value=value, low=low, high=high, n=n)


def side(refusal: Estimate, compliance: Estimate, coherence: Estimate, product: Estimate):
    return BehaviourSide(
        refusal=refusal,
        compliance=compliance,
        coherence=coherence,
        product=product,
        truncated=rate(0.0, 0.0, 0.057),
        unscored=rate(0.0, 0.0, 0.057),
    )


def target_behaviour() -> Behaviour:
    base = side(
        rate(0.984, 0.917, 0.997), rate(0.016, 0.003, 0.083), rate(1.0), rate(0.016, 0.0, 0.047)
    )
    edited = side(
        rate(0.016, 0.003, 0.083),
        rate(0.977, 0.938, 1.0),
        rate(0.992, 0.977, 1.0),
        rate(0.969, 0.93, 1.0),
    )
    change = side(
        rate(-0.969, -1.0, -0.922),
        rate(0.961, 0.914, 1.0),
        rate(-0.008, -0.023, 0.0),
        rate(0.953, 0.906, 0.992),
    ).model_copy(update={"truncated": rate(0.0), "unscored": None})
    return Behaviour(base=base, edited=edited, delta=change)


def demo_record() -> RunRecord:
    """A run on the embedded model: local base, two prompt sets judged, one benchmark."""
    return RunRecord(
        tool=Tool(version="0.1.0"),
        recipe={
            "model": "embedded:demo",
            "layers": [3, 2],
            "k": 2,
            "chat": {"system": "/no_think", "template_kwargs": {}},
            "prompts": {"target": {"path": "/home/someone/private/target.jsonl"}},
        },
        recipe_digest=SHA,
        model=ModelIdentity(
            id="embedded:demo",
            revision=None,
            n_layers=4,
            d_model=128,
            model_type="llama",
            license="Apache-2.0",
            files_sha256={"model.safetensors": SHA, "config.json": SHA},
        ),
        edit=EditSummary(
            layers=(3, 2),
            positions=(-1,),
            k=2,
            strength={"attention": 1.0, "mlp": 0.8},
            components=("attention", "mlp"),
            norm="none",
            rounding="compensated",
            tensors=8,
            max_leak=3.21e-05,
            median_leak=1.07e-05,
            output_bytes=2_345_678,
            edited_bytes=786_432,
        ),
        behaviour={"target": target_behaviour(), "neutral": target_behaviour()},
        divergence=Divergence(
            kl_first_token=rate(0.0123, 0.0101, 0.0152, 128),
            top1_agreement=rate(0.992, 0.957, 0.999, 128),
        ),
        benchmarks={
            "toy_facts": BenchmarkResult(
                metric="acc",
                n=240,
                base=rate(0.95, 0.915, 0.971, 240),
                edited=rate(0.9458, 0.9096, 0.968, 240),
                delta=rate(-0.0042, -0.0125, 0.0, 240),
                smallest_detectable=0.0117,
                gained=1,
                lost=2,
                settings={"num_fewshot": 0, "chat_template": False},
                p_value=1.0,
                p_holm=1.0,
                gold_loglik=rate(-0.0213, -0.0306, -0.0122, 240),
            )
        },
        judge=JudgeIdentity(kind="rules", version="1"),
        provenance=Provenance(
            created="2026-11-23T06:00:00Z",
            python="3.11.9",
            platform="Linux x86_64",
            packages={"transformers": "5.23.0", "torch": "2.13.0"},
            device="cpu",
            dtype="float32",
            prompts=(
                PromptOrigin(
                    name="target",
                    source="/home/someone/private/target.jsonl",
                    revision=None,
                    n=128,
                    sha256=SHA,
                ),
                PromptOrigin(
                    name="neutral",
                    source="mlabonne/harmless_alpaca",
                    revision=COMMIT,
                    split="train[:520]",
                    n=390,
                    sha256=SHA,
                    dropped=3,
                    license="cc-by-nc-4.0",
                ),
            ),
            dropped_overlap=1,
        ),
    )


def hub_record() -> RunRecord:
    """A Hub base of which nothing was measured."""
    record = demo_record()
    identity = ModelIdentity(
        id="meta-llama/Llama-3.2-1B-Instruct",
        revision=COMMIT,
        n_layers=16,
        d_model=2048,
        model_type="llama",
        license="llama3.2",
        languages=("en", "de"),
    )
    return record.model_copy(
        update={
            "model": identity,
            "recipe": {"model": identity.id, "layers": [9], "k": 1},
            "edit": record.edit.model_copy(
                update={"k": 1, "layers": (9,), "max_leak": None, "median_leak": None}
            ),
            "behaviour": {},
            "divergence": None,
            "benchmarks": {},
            "judge": None,
        }
    )


def header_of(card: str) -> dict[str, Any]:
    _, header, _ = re.split(r"^---$", card, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(header)


def body_of(card: str) -> str:
    return re.split(r"^---$", card, maxsplit=2, flags=re.MULTILINE)[2]


def tokens_of(markdown: str):
    parser = MarkdownIt("commonmark").enable("table")
    for token in parser.parse(markdown):
        yield token
        yield from token.children or ()


def structure(card: str) -> list[tuple[str, str]]:
    """Kinds of all tokens of the body: what a reader sees as headings, tables, spans and fences."""
    return [(token.type, token.tag) for token in tokens_of(body_of(card))]


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


def test_model_cards_are_what_their_command_writes():
    """After a wanted change: python model_cards/render.py, and read the difference."""
    script = runpy.run_path(str(ROOT / "model_cards" / "render.py"))
    cards = dict(script["cards"]())
    folder = ROOT / "model_cards"
    assert cards == {path.name: path.read_text("utf-8") for path in folder.glob("*.md")}
    recipes = (ROOT / "recipes").glob("*.yaml")
    of_the_seed = {path.stem for path in recipes if "\n# Seed: " in path.read_text("utf-8")}
    assert {Path(name).stem for name in cards} == {"demo", *of_the_seed}


def test_a_card_of_the_seed_quotes_it_and_claims_nothing():
    card = (ROOT / "model_cards" / "llama3_2_1b_k4.md").read_text("utf-8")
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


def selection() -> dict[str, Any]:
    """What a sweep of two layers finds, in short."""
    found = {name: rate(0.5).model_dump() for name in ("refusal", "compliance", "coherence")}
    answers = {**found, "product": rate(0.25).model_dump(), "tokens": 9}
    scores = {"bypass": -1.0, "kl": 0.01, "induce": 2.0, "stopped_by": []}
    return {
        "layers": [3, 2],
        "k": 1,
        "why": "the recipe",
        "base": {"bypass": 1.0, "answers": answers},
        "candidates": [
            {"layer": 2, **scores, "answers": None},
            {"layer": 3, **scores, "answers": answers},
        ],
        "stacks": [],
        "structure": {
            "layers": [2, 3],
            "cosines": [[1.0, 0.5], [0.5, 1.0]],
            "participation_ratio": 1.6,
            "verdict": "low-rank subspace",
            "because": "...",
        },
        "rollout_tokens": 9,
    }


def tuning() -> dict[str, Any]:
    point = {
        "refusal": rate(0.1).model_dump(),
        "product": rate(0.9).model_dump(),
        "kl": 0.0123,
        "kl_first_token": 0.0234,
    }
    points = [{**point, "on_front": front} for front in (False, True)]
    return {"lessons": 40, "points": points, "taken": 1}


PICTURES = {"abliterator/cosines.png": SHA, "abliterator/sweep.png": SHA}


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


@pytest.mark.parametrize(
    ("unpacked", "says"), [(False, "Kept in this format"), (True, "Written as bfloat16")]
)
def test_what_quantised_tensors_became_is_on_the_card(unpacked: bool, says: str):
    edits = QuantizedEdits(
        format="MXFP4",
        tensors=24,
        unpacked=unpacked,
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


def test_another_judge_is_named_with_its_calibration():
    judge = JudgeIdentity(
        kind="openai",
        model="judge-1",
        prompt_sha256=SHA,
        version="2",
        calibration={"n": 300, "kappa": 0.81},
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


# ---------------------------------------------------------------- fields that try to break the card

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
            if path and path[0] not in OUR_KEYS and (*path, key) not in MEANT:
                yield (*path, key, "@")
            yield from _texts(inner, (*path, key))
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _texts(inner, (*path, index))
    elif isinstance(value, str) and path not in MEANT:
        yield path


OUR_KEYS = {"selection", "tuning"}  # plain values, but of a shape that this tool gives them
# Texts that select what is shown, so that another one is meant to change the structure.
MEANT = {
    *(("behaviour", name) for name in ("target", "neutral", "over_refusal")),
    *(("pictures", name) for name in PICTURES),
    ("judge", "kind"),
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
