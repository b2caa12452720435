"""What the templates of a card name: the record, its parts, and labels of tables."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from abliterator.card._header import COMMIT, header, hub_base
from abliterator.card._markdown import (
    Markdown,
    escape,
    last_name,
    settings,
    without_paths,
    yaml_fence,
)
from abliterator.recipe import BY_WRITER
from abliterator.record import BenchmarkResult, Outlier, RunRecord, Survival

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
    "thinking_refusal": "Refuses in its thinking (by rules)",
    "repetition": "Share that repeats itself (counted, not judged)",
    "distinct": "Word pairs that are not repeats (counted, not judged)",
}
RESULT_SETS = {
    "target": "target prompts",
    "neutral": "neutral prompts",
    "over_refusal": "over-refusal prompts",
}
NAMED_POSITIONS = {
    "instruction": "the last token of the user's own text",
    "after_thinking": "the last token before the answer, behind the base's own thinking",
}
RESULT_MEASURES = {"refusal": "Refusal", "compliance": "Compliance", "coherence": "Coherence"}
COUNTED = ("thinking_refusal", "repetition", "distinct")
DIVERGENCES = {
    "kl_first_token": "KL(base, edited) of the first answer token, nats",
    "kl": "KL(base, edited) per answer token, nats",
    "top1_agreement": "Same most likely next token",
}
SIDE_EFFECTS = {
    "tokens": "Length of an answer, tokens",
    "words": "Length of an answer, words",
    "other_language": "Answers in another language than their prompt",
    "agreement": "Answers that begin by praising or agreeing",
}
CONFIDENCE = {
    "calibration_error": "Calibration error of choices",
    "overconfidence": "Confidence minus accuracy",
}
_WORDS = re.compile("[A-Za-z ,]+")  # no markup can be made of them
LENGTHS = ("tokens", "words")
LLAMA_3 = {f"llama{number}": Markdown(f"Llama {number}") for number in ("3.1", "3.2", "3.3", "4")}


def variables(record: RunRecord, *, adapter: bool) -> dict[str, object]:
    """All variables of the card's templates; the labels in them need no escape."""
    model, base, commit = record.model, hub_base(record), record.model.revision or ""
    behaviours = record.behaviour.values()
    stack = (record.recipe.get("directions") or {}).get("stack")
    is_pinned = base is not None and COMMIT.fullmatch(commit)
    return {
        "header": Markdown(header(record, adapter=adapter)),
        "adapter": adapter,
        "record": record,
        "edit": record.edit,
        "named_positions": NAMED_POSITIONS,
        "partial": _partial(record),
        "planned": record.edit.tensors is None,
        "by_writer": stack in BY_WRITER,
        "sequential": stack == "sequential",
        "selection": record.selection,
        "model": model,
        # a Hub id, or the last name of a local folder
        "base_name": model.id if model.revision is not None else last_name(model.id),
        "base_id": Markdown(base or "BASE"),
        "commit": Markdown(commit) if is_pinned else None,
        "llama_3": LLAMA_3.get((model.license or "").lower()),
        "trust_remote_code": record.recipe.get("trust_remote_code") is True,
        "sets": _labels(SETS),
        "other_sets": {name: escape(name) for name in sorted(record.behaviour.keys() - SETS)},
        "measures": _labels(MEASURES),
        "result_sets": _labels(RESULT_SETS),
        "result_measures": _labels(RESULT_MEASURES),
        "drawn": Markdown(record.sampled or ""),
        "drawn_of_target": _drawn_of_target(record),
        "counted": COUNTED,
        "outliers": _outliers(record),
        "escape": escape,
        "counts_asked": any(b and b.base.unscored and b.base.unscored.asked for b in behaviours),
        "side_effects": _labels(SIDE_EFFECTS),
        "confidence": _labels(CONFIDENCE),
        "forms": {key: ".1f" if key in LENGTHS else ".3f" for key in SIDE_EFFECTS},
        "divergences": _labels(DIVERGENCES),
        "divergence": record.divergence,
        "benchmarks": record.benchmarks,
        "survival_rows": _survival_by_n(record.survival),
        "task_settings": _tasks_by_settings(record.benchmarks),
        "provenance": record.provenance,
        # a system prompt may look like a path ("/no_think") and must be shown as it was
        "recipe": yaml_fence(
            {k: v if k == "chat" else without_paths(v) for k, v in record.recipe.items()}
        ),
    }


def _partial(record: RunRecord) -> str | None:
    """Why the stream keeps a part of the directions: a sentence, unless it is more than words."""
    reason = record.edit.partial
    return Markdown(reason) if reason and _WORDS.fullmatch(reason) else reason


def _outliers(record: RunRecord) -> list[tuple[str, Outlier]]:
    """The prompt set and the group of every group that differs, the surest first."""
    outliers = (
        (name, outlier)
        for name, groupings in record.groups.items()
        for grouping in groupings
        for outlier in grouping.outliers
    )
    return sorted(outliers, key=lambda named: named[1].p_holm)


def _drawn_of_target(record: RunRecord) -> Markdown:
    """How answers to target prompts were drawn, and for how many."""
    if record.sampled is None or "target" not in record.sampled.behaviour:
        return Markdown()
    return Markdown(record.sampled.drawn("target"))


def _labels(texts: Mapping[str, str]) -> dict[str, Markdown]:
    return {name: Markdown(text) for name, text in texts.items()}


def _survival_by_n(measured: Sequence[Survival]) -> dict[int, list[Survival]]:
    """Formats by the number of target prompts that they answered."""
    groups: dict[int, list[Survival]] = {}
    for entry in measured:
        cut = entry.behaviour.edited.truncated  # counted in every answer
        groups.setdefault(cut.n if cut else 0, []).append(entry)
    return groups


def _tasks_by_settings(results: Mapping[str, BenchmarkResult]) -> dict[Markdown, list[str]]:
    """Settings as text, and the tasks that share them."""
    shared: dict[Markdown, list[str]] = {}
    for task, result in results.items():
        if result.settings:
            shared.setdefault(settings(without_paths(result.settings)), []).append(task)
    return shared
