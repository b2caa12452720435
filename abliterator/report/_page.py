"""The page, from its templates, styles and scripts."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import yaml

from abliterator.record import Behaviour, Estimate, PairedFigure, RunRecord
from abliterator.report._build import Build
from abliterator.report._data import inert_json, page_data
from abliterator.report._models import compliance, model_rows

if TYPE_CHECKING:
    from jinja2 import Environment

SCRIPTS = ("plot/d3.min.js", "plot/plot.umd.min.js", "page.js", "answers.js", "charts.js")
SETS = {"target": "Target prompts", "neutral": "Neutral prompts", "over_refusal": "Over-refusal"}
SIDE_EFFECTS = {
    "tokens": "Length of an answer, tokens",
    "words": "Length of an answer, words",
    "other_language": "In another language than the prompt",
    "agreement": "Begins by praising or agreeing",
}
CONFIDENCE = {
    "calibration_error": "Calibration error of choices",
    "overconfidence": "Confidence minus accuracy",
}
MEASURES = {
    "refusal": "Refusal",
    "compliance": "Compliance",
    "coherence": "Coherence",
    "product": "Compliance × coherence",
    "truncated": "Cut at the token limit",
    "unscored": "Unscored",
    "thinking_refusal": "Refuses in its thinking",
    "repetition": "Share that repeats itself",
    "distinct": "Distinct word pairs",
}


def render_report(builds: Sequence[Build]) -> str:
    """The HTML of a report on one build, or on several: then with a table across models.

    Args:
        builds: at least one.
    """
    from markupsafe import Markup

    scripts = [_text(name) for name in SCRIPTS]
    records = [build.record for build in builds]
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            builds=list(zip(builds, records, strict=True)),
            rows=model_rows(builds),
            style=Markup(_text("report.css")),
            scripts=[Markup(script) for script in scripts],
            script_hashes=" ".join(map(_csp_hash, scripts)),
            data=Markup(inert_json(page_data(builds))),
            sets=SETS,
            tables=measures_tables,
            measures=MEASURES,
        )
    )


def measures_tables(record: RunRecord) -> list[tuple[str, Behaviour]]:
    """The measured prompt sets, each with a title: of greedy answers, then of drawn ones."""
    tables = [(SETS.get(name, name), b) for name, b in record.behaviour.items() if b]
    if record.sampled:
        drawn = record.sampled.behaviour.items()
        tables += [(f"{SETS.get(name, name)}, {record.sampled}", b) for name, b in drawn]
    return tables


@cache
def _text(name: str) -> str:
    return (files("abliterator.report") / name).read_text("utf-8")


def _csp_hash(script: str) -> str:
    """The script's hash as a content security policy has it."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"'sha256-{digest}'"


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("abliterator", "report"),
        autoescape=True,
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "number": number,
        "last_name": lambda model: model.replace("\\", "/").rstrip("/").rpartition("/")[2],
        "yaml": lambda values: yaml.safe_dump(values, sort_keys=False, allow_unicode=True),
        "span": _span,
        "compliance": compliance,
        "refusal": _refusal,
        "side_effects": _side_effects,
    }
    return environment


def number(value: float | None, form: str = ".3f") -> str:
    """A number in one form; a dash where there is none, and no negative zero."""
    if value is None:
        return "–"
    text = format(value, form)
    zero = text.lstrip("+-").strip("0.") == "" and "e" not in text
    return text.lstrip("+-") if zero else text.replace("-", "−")


def _span(estimate: Estimate) -> tuple[float, float, float]:
    """Value, low and high in percent of the scale from 0 to 1, for drawing."""
    low = estimate.value if estimate.low is None else estimate.low
    high = estimate.value if estimate.high is None else estimate.high
    return tuple(round(100 * min(1.0, max(0.0, x)), 2) for x in (estimate.value, low, high))  # type: ignore[return-value]


def _side_effects(record: RunRecord) -> Iterator[tuple[str, str, PairedFigure | None, str]]:
    """Label, prompt set or task, figure and form of each line; one without a figure if not any."""
    yield from _figures(SIDE_EFFECTS, record.side_effects)
    yield from _figures(CONFIDENCE, record.confidence)


def _figures(
    labels: Mapping[str, str], measured: Mapping[str, Mapping[Any, PairedFigure]]
) -> Iterator[tuple[str, str, PairedFigure | None, str]]:
    for key, label in labels.items():
        form = ".1f" if label.startswith("Length") else ".3f"
        names = [name for name, figures in measured.items() if key in figures]
        for name in names:
            yield label, name, measured[name][key], form
        if not names:
            yield label, "", None, form


def _refusal(record: RunRecord, side: str) -> Estimate | None:
    """Refusal of target prompts on one side."""
    target = record.behaviour.get("target")
    estimate: Estimate | None = None if target is None else getattr(target, side).refusal
    return estimate
