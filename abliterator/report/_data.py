"""The data of the page as plain JSON values: what scripts draw, and answers by prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from abliterator.record import AnswerSummary, Completion, Estimate, Selection, Tuning, Verdict
from abliterator.report._build import Build

Key: TypeAlias = tuple[str, str, int]  # set, side, index: names an answer


def inert_json(value: Any) -> str:
    """JSON of ASCII alone that neither HTML nor JavaScript can read as anything else.

    `<`, `>` and `&` are escaped, so that no text ends the element that the JSON stands in, and so
    are U+2028, U+2029 and all else beyond ASCII.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def page_data(builds: Sequence[Build]) -> dict[str, Any]:
    """All that the page's scripts need."""
    return {"builds": [_build(build) for build in builds]}


def _build(build: Build) -> dict[str, Any]:
    record = build.record
    return {
        "name": build.name,
        "model": record.model.id,
        "layers": record.edit.layers,
        "gates": dict(build.gates),
        "measures": {
            name: {side: {k: _estimate(v) for k, v in getattr(behaviour, side)} for side in _SIDES}
            for name, behaviour in record.behaviour.items()
            if behaviour is not None
        },
        "benchmarks": {
            f"{task} ({result.metric})": {
                side: _estimate(getattr(result, side)) for side in ("base", "edited", "delta")
            }
            for task, result in record.benchmarks.items()
        },
        "answers": _answers(build),
        "selection": None if record.selection is None else _selection(record.selection),
        "cosines": [[round(cosine, 3) for cosine in row] for row in build.cosines],
        "tuning": None if record.tuning is None else _tuning(record.tuning),
        "flipped": {task: [list(pair) for pair in pairs] for task, pairs in build.flipped.items()},
        "tensors": [
            {
                "name": edit.name,
                "layer": edit.layer,
                "component": edit.component,
                "shape": edit.shape,
                "dtype": edit.dtype,
                "strength": edit.strength,
                "leak": edit.leak,
                # what is written along the directions beyond what this strength leaves
                "off": None if edit.leak is None else abs(edit.leak - abs(1 - edit.strength)),
                "change": build.changes.get(edit.name),
            }
            for edit in sorted(build.edits, key=lambda edit: (edit.layer, edit.name))
        ],
        "record": build.record_text,
    }


_SIDES = ("base", "edited", "delta")


def _estimate(estimate: Estimate | None) -> list[float | None] | None:
    if estimate is None:
        return None
    return [estimate.value, estimate.low, estimate.high, estimate.n, estimate.asked]


def _answers(build: Build) -> dict[str, list[dict[str, Any]]]:
    """By prompt set: each prompt once, with the answer of each side."""
    verdicts, by_rules = _by_key(build.verdicts), _by_key(build.by_rules)
    sets: dict[str, dict[int, dict[str, Any]]] = {}
    for answer in build.answers:
        key = (answer.set, answer.side, answer.index)
        row = sets.setdefault(answer.set, {}).setdefault(answer.index, {"prompt": answer.prompt})
        row[answer.side] = {"read": answer.prompt} if answer.earlier else {}
        row[answer.side] |= _answer(answer, verdicts.get(key), by_rules.get(key))
        columns = build.groups.get(answer.set, {})
        if groups := {name: group for name, c in columns.items() if (group := c[answer.index])}:
            row["groups"] = groups
    return {name: [rows[index] for index in sorted(rows)] for name, rows in sets.items()}


def _by_key(verdicts: Sequence[Verdict]) -> Mapping[Key, Verdict]:
    return {(v.set, v.side, v.index): v for v in verdicts}


def _answer(
    answer: Completion, verdict: Verdict | None, by_rules: Verdict | None
) -> dict[str, Any]:
    start = answer.answer_start or 0
    fields: dict[str, Any] = {
        "text": answer.response[start:],
        "tokens": answer.n_tokens,
        "cut": answer.finish_reason == "length",
    }
    if thinking := answer.response[:start]:
        fields["thinking"] = thinking
    if verdict is not None:
        fields |= {
            "kind": verdict.kind or "unscored",
            "compliance": verdict.compliance,
            "coherence": verdict.coherence,
            "reasons": verdict.reasons,
        }
        if verdict.thinking_refused is not None:
            fields["thinkingRefuses"] = verdict.thinking_refused
    if verdict is not None and by_rules is not None and by_rules.kind != verdict.kind:
        fields["rules"] = by_rules.kind or "unscored"
    return fields


def _selection(selection: Selection) -> dict[str, Any]:
    return {
        "base": {
            "bypass": selection.base.bypass,
            **_rates(selection.base.answers),
        },
        "candidates": [
            {
                "layer": c.layer,
                "position": c.position,
                "bypass": c.bypass,
                "kl": c.kl,
                "induce": c.induce,
                "stopped": c.stopped_by,
                **_rates(c.answers),
            }
            for c in selection.candidates
        ],
    }


def _rates(answers: AnswerSummary | None) -> dict[str, Any]:
    if answers is None:
        return {}
    return {name: _estimate(getattr(answers, name)) for name in ("compliance", "coherence")}


def _tuning(tuning: Tuning) -> list[dict[str, Any]]:
    return [
        {
            "kl": trial.kl,
            "refusal": _estimate(trial.refusal),
            "product": _estimate(trial.product),
            "weight": trial.kl_weight,
            "scale": trial.scale,
            "front": trial.on_front,
            "start": i == 0,
            "selected": i == tuning.selected,
        }
        for i, trial in enumerate(tuning.trials)
    ]
