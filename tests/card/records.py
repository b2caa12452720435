"""Records to make cards of, and what a reader sees of a card."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from markdown_it import MarkdownIt

from abliterator.record import (
    AnswerSummary,
    Behaviour,
    BehaviourSide,
    BenchmarkResult,
    Candidate,
    Divergence,
    EditSummary,
    Estimate,
    Group,
    Grouping,
    GroupMeasure,
    JudgeIdentity,
    ModelIdentity,
    PairedFigure,
    PromptOrigin,
    Provenance,
    RunRecord,
    Selection,
    SelectionBase,
    SideEffect,
    Structure,
    Tool,
    Trial,
    Tuning,
)

ROOT = Path(__file__).parents[2]
FieldPath = tuple[str | int, ...]
GOLDEN = ROOT / "tests" / "card" / "golden"
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
                    read=400,
                    dropped=4,
                    overlap=1,
                    near=2,
                    license="cc-by-nc-4.0",
                ),
            ),
            dropped_overlap=1,
            near_duplicate=0.75,
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


def selection() -> Selection:
    """What a sweep of two layers finds, in short."""
    half = rate(0.5)
    answers = AnswerSummary(
        refusal=half, compliance=half, coherence=half, product=rate(0.25), tokens=9
    )
    scored = Candidate(layer=2, bypass=-1.0, kl=0.01, induce=2.0)
    return Selection(
        layers=(3, 2),
        positions=(-1, -1),
        k=1,
        why="the recipe",
        base=SelectionBase(bypass=1.0, answers=answers),
        candidates=(scored, scored.model_copy(update={"layer": 3, "answers": answers})),
        structure=Structure(
            layers=(2, 3),
            cosines=((1.0, 0.5), (0.5, 1.0)),
            participation_ratio=1.6,
            verdict="low-rank subspace",
            because="...",
        ),
        rollout_tokens=9,
    )


def tuning() -> Tuning:
    """The start and one tuned edit, which is selected."""
    start = Trial(
        kl_weight=0.0,
        scale=1.0,
        cosine=1.0,
        kl=0.0123,
        kl_first_token=0.0234,
        refusal=rate(0.1),
        compliance=rate(0.95),
        coherence=rate(0.95),
        product=rate(0.9),
    )
    tuned = start.model_copy(update={"kl_weight": 20.0, "on_front": True})
    return Tuning(preference_pairs=40, trials=(start, tuned), selected=1)


def groups() -> dict[str, tuple[Grouping, ...]]:
    """Target prompts of two categories, of which one still declines."""

    def measured(edited: Estimate, p: float) -> GroupMeasure:
        return GroupMeasure(
            base=rate(1.0, 0.839, 1.0, 20),
            edited=edited,
            delta=rate(edited.value - 1.0, n=20),
            p_delta=p,
            p_delta_holm=p,
            p_rest=p,
            p_rest_holm=p,
        )

    def group(name: str, refusal: Estimate, refused: int) -> Group:
        measures = {"refusal": measured(refusal, 0.001), "compliance": measured(rate(0.5), 1.0)}
        kinds = {"base": {"refused": 20}, "edited": {"refused": refused}}
        return Group(name=name, asked=20, answers=20, measures=measures, kinds=kinds)

    declines = Estimate(value=0.9, low=0.699, high=0.972, n=19, asked=20)
    members = (group("knitting", declines, 18), group("tea", rate(0.1, 0.0, 0.5, 20), 2))
    overall = {"refusal": rate(0.5, n=40), "compliance": rate(0.5, n=40)}
    return {"target": (Grouping(column="category", ungrouped=1, overall=overall, groups=members),)}


def side_effects() -> dict[str, dict[SideEffect, PairedFigure]]:
    """Lengths of answers to target prompts, of which one was left out."""
    delta = Estimate(value=-9.0, low=-13.0, high=-5.0, n=63, asked=64)
    return {"target": {"words": PairedFigure(base=rate(60.5), edited=rate(51.5), delta=delta)}}


PICTURES = {"abliterator/cosines.png": SHA, "abliterator/sweep.png": SHA}
