"""A run's record to the README of its checkpoint.

`render_card` is a pure function: the record in, the text out. It reads its template and nothing
else: no network, no model, no clock. What was not measured says so. A record holds no prompt and no
answer, so a card cannot show one.

Every string that the template prints is escaped unless `_markdown` made it (`Markdown`): an id, a
licence or a path can break neither a table nor the header, and a new line of the template cannot
forget to escape.

    (checkpoint / "README.md").write_text(render_card(record), encoding="utf-8")
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from abliterator.card._header import COMMIT, adapter_header, header, hub_base
from abliterator.card._licences import obligations, stated_license, with_license
from abliterator.card._markdown import (
    Markdown,
    delta,
    escape,
    estimate,
    interval,
    last_name,
    listed,
    number,
    probability,
    settings,
    without_paths,
    yaml_fence,
)
from abliterator.record import BenchmarkResult, JudgeIdentity, PromptOrigin, RunRecord

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["escape", "render_adapter_card", "render_card", "stated_license", "with_license"]

SETS = {
    "target": "Target prompts (the behaviour that was to go)",
    "neutral": "Neutral prompts (what was to stay)",
    "over_refusal": "Over-refusal prompts (harmless, but they look like target prompts)",
}
MEASURES = {
    "refusal": "Refusal",
    "compliance": "Compliance (0, 0.5 or 1)",
    "coherence": "Coherence (0, 0.5 or 1)",
    "product": "Compliance x coherence",
    "truncated": "Cut at the token limit",
    "unscored": "Unscored",
}
GUARDS = {
    "repetition": "Share that repeats itself (counted, not judged)",
    "distinct": "Word pairs that are not repeats (counted, not judged)",
}
DIVERGENCES = {
    "kl_first_token": "KL(base, edited) of the first answer token, nats",
    "kl": "KL(base, edited) per answer token, nats",
    "top1_agreement": "Same most likely next token",
}


def render_card(record: RunRecord) -> str:
    """The Markdown of a checkpoint's card, YAML header included, ending in one newline."""
    return _render(record, header(record), adapter=False)


def render_adapter_card(record: RunRecord) -> str:
    """The card of the adapter of the same run: it says that the checkpoint is what was measured."""
    return _render(record, adapter_header(record), adapter=True)


def _render(record: RunRecord, head: str, *, adapter: bool) -> str:
    name = _base_name(record)
    text = _template().render(
        header=Markdown(head),
        adapter=adapter,
        ending=Markdown(": the adapter" if adapter else ""),
        record=record,
        edit=record.edit,
        base=name,
        title=name.rpartition("/")[2],
        local=record.model.revision is None,
        planned=record.edit.tensors is None,
        obligations=obligations(record.model.license),
        judge=_judge(record.judge),
        judge_name=_judge_name(record.judge),
        judged=any(record.behaviour.values()),
        sets=_sets(record),
        measures={key: Markdown(label) for key, label in MEASURES.items()},
        guards={key: Markdown(label) for key, label in GUARDS.items()},
        divergences={key: Markdown(label) for key, label in DIVERGENCES.items()},
        benchmark_settings=_benchmark_settings(record.benchmarks),
        prompts=[(origin, _source(origin)) for origin in record.provenance.prompts],
        gaps=list(_gaps(record)),
        recipe=yaml_fence(_shown_recipe(record.recipe)),
        base_literal=Markdown(hub_base(record) or "BASE"),
        base_commit=_base_commit(record),
        remote_code=_remote_code(record),
    )
    return text.rstrip("\n") + "\n"


def _base_commit(record: RunRecord) -> Markdown:
    """The base's commit, if it is one and is on the Hub; else nothing."""
    commit = record.model.revision or ""
    return Markdown(commit if hub_base(record) and COMMIT.fullmatch(commit) else "")


def _remote_code(record: RunRecord) -> bool:
    return record.recipe.get("trust_remote_code") is True


def _base_name(record: RunRecord) -> str:
    """A Hub id, or the last name of a local folder."""
    model = record.model
    return model.id if model.revision is not None else last_name(model.id)


def _source(origin: PromptOrigin) -> str:
    """A Hub dataset id, or the name of a local file."""
    return origin.source if origin.revision is not None else last_name(origin.source)


def _shown_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    # a system prompt may look like a path ("/no_think") and must be shown as it was
    return {key: value if key == "chat" else without_paths(value) for key, value in recipe.items()}


def _judge(judge: JudgeIdentity | None) -> Markdown:
    """One plain phrase: which judge, and how far it was ever checked."""
    if judge is None:
        return Markdown("a judge that was not recorded")
    if judge.kind == "rules":
        what = "a rule judge: phrase and repetition rules, no model"
    else:
        what = f"the judge {escape(judge.kind)}, model {escape(judge.model or 'not stated')}"
    what += f"; version {escape(judge.version)}"
    if judge.served_model is not None:
        what += f"; the server called itself {escape(judge.served_model)}"
    if judge.fingerprints:
        what += f" ({listed(judge.fingerprints)})"
    if judge.prompt_sha256 is not None:
        what += f"; sha256 of its instructions {escape(judge.prompt_sha256)}"
    for other, rate in judge.disagreement.items():
        what += f"; it disagrees with {escape(other)} on {estimate(rate)}"
    if judge.calibration is None:
        return Markdown(f"{what}; uncalibrated (never measured against human labels)")
    return Markdown(f"{what}; against human labels: {settings(judge.calibration)}")


def _judge_name(judge: JudgeIdentity | None) -> Markdown:
    """The judge in the heading of every table of its numbers."""
    if judge is None:
        return Markdown("judge not recorded")
    return Markdown("rule judge" if judge.kind == "rules" else f"judge {escape(judge.kind)}")


def _sets(record: RunRecord) -> list[tuple[Markdown, Any]]:
    """(heading, behaviour or None) of the three sets everyone expects, then any others."""
    others = sorted(set(record.behaviour) - set(SETS))
    known = [(Markdown(label), record.behaviour.get(name)) for name, label in SETS.items()]
    return known + [(escape(name), record.behaviour[name]) for name in others]


def _benchmark_settings(results: dict[str, BenchmarkResult]) -> list[tuple[Markdown, Markdown]]:
    """(tasks, settings), one pair for the tasks that share their settings."""
    shared: dict[str, list[str]] = {}
    for task, result in results.items():
        if result.settings:
            shared.setdefault(settings(without_paths(result.settings)), []).append(task)
    return [(listed(tasks), Markdown(text)) for text, tasks in shared.items()]


def _gaps(record: RunRecord) -> Iterator[Markdown]:
    """What a reader might expect here and nobody measured."""
    for name, label in SETS.items():
        if record.behaviour.get(name) is None:
            yield Markdown(f"Behaviour on {label[0].lower()}{label[1:]}.")
    if record.judge is not None and record.judge.calibration is None:
        yield Markdown("How far this judge agrees with people.")
    for name, label in DIVERGENCES.items():
        if record.divergence is None or getattr(record.divergence, name) is None:
            yield Markdown(f"{label}.")
    if record.divergence is None or record.divergence.perplexity_edited is None:
        yield Markdown("Perplexity.")
    if not record.benchmarks:
        yield Markdown("Benchmarks.")
    if record.edit.max_leak is None:
        yield Markdown("The leak: what the edited matrices still write along the directions.")


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    text = resources.files("abliterator.card").joinpath("template.md.jinja").read_text("utf-8")
    environment = Environment(
        autoescape=False,  # that would be HTML's escape, which is not Markdown's
        finalize=_escaped_by_default,
        keep_trailing_newline=True,
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "delta": delta,
        "estimate": estimate,
        "interval": interval,
        "listed": listed,
        "number": number,
        "probability": probability,
        "settings": settings,
    }
    return environment.from_string(text)


def _escaped_by_default(value: object) -> object:
    return value if isinstance(value, (int, Markdown)) else escape(value)
