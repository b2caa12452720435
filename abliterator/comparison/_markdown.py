"""Renders a comparison as Markdown."""

from __future__ import annotations

import re
from collections import Counter

from abliterator.judge import counted
from abliterator.record import (
    Behaviour,
    BenchmarkResult,
    Comparison,
    Difference,
    Divergence,
    OwnScores,
    TensorDelta,
    WeightDiff,
)
from abliterator.tables import cell, markdown_table

SHOWN = 200  # tensors in the table; the JSON has them all
OTHER_VOCABULARY = (
    "the same token id is not the same token on both sides, so each was asked in its own way and "
    "they were not asked the same"
)
_PARTS = {
    "chat_template": "chat template",
    "tokenizer": "tokenizer",
    "stop_tokens": "stop tokens",
    "generation_config": "generation_config.json",
    "config": "config",
    "code": "code",
}
_PROMPTING_NOTES = {
    "alike": "Both sides are asked the same: nothing that is named here has a part in that.",
    "as_base": "Both sides were asked with the base's chat template, tokenizer, stop tokens and "
    "generation settings, so that their weights and configs alone differ. What the edited model "
    "answers with its own is not measured.",
    "apart": f"Not comparable: {OTHER_VOCABULARY}. Figures are each side's own, and no difference "
    "between them is given.",
}
MEASURES = ("refusal", "compliance", "coherence", "product", "truncated", "unscored")


def to_markdown(comparison: Comparison) -> str:
    """The comparison as Markdown; an estimate is `value [95 % interval] (n=40)`."""
    parts = [f"# {comparison.base} and {comparison.edited}", *_beside(comparison)]
    parts += _weights(comparison.weights)
    parts += [
        f"No difference of {name} is given: {why}." for name, why in comparison.withheld.items()
    ]
    apart = comparison.asked == "apart"
    for name, behaviour in comparison.behaviour.items():
        judge = comparison.judge.model or comparison.judge.kind if comparison.judge else "nobody"
        parts += [f"## Answers to {name} prompts (judged by {judge})", _behaviour(behaviour, apart)]
    if comparison.divergence:
        parts += ["## Divergence on neutral prompts", _divergence(comparison.divergence)]
    if comparison.benchmarks:
        parts += ["## Benchmarks", _benchmarks(comparison.benchmarks)]
    if comparison.benchmarks_apart:
        parts += ["## Benchmarks, each side on its own", _apart(comparison.benchmarks_apart)]
    return "\n\n".join(parts) + "\n"


def difference_line(difference: Difference) -> str:
    """A difference beside the weights, on one line."""
    sides = ("none" if side is None else side for side in (difference.base, difference.edited))
    return f"{_PARTS[difference.part]}, {difference.name}: {' -> '.join(sides)}"


def _beside(comparison: Comparison) -> list[str]:
    """The section on differences beside the weights, and their effect on the figures."""
    parts = ["## Beside the weights"]
    if not comparison.beside:
        return [*parts, f"Nothing differs: {', '.join(_PARTS.values())}."]
    rows = [
        [
            _PARTS[difference.part],
            _code(difference.name),
            *map(_code, (difference.base, difference.edited)),
        ]
        for difference in comparison.beside[:SHOWN]
    ]
    parts += [
        markdown_table(["Part", "What", "Base", "Edited"], rows),
        _PROMPTING_NOTES[comparison.asked],
    ]
    if any(difference.part in ("config", "code") for difference in comparison.beside):
        parts.append(
            "The two compute differently with equal weights: figures are those of weights and "
            "config (or code) together."
        )
    return parts


def _code(text: str | None) -> str:
    """Text of a checkpoint in a cell of a table, as code."""
    if text is None:
        return "none"
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    inside = text.replace("|", "\\|")
    return f"{ticks} {inside} {ticks}" if len(ticks) > 1 else f"`{inside}`"


def _weights(weights: WeightDiff) -> list[str]:
    parts = ["## Weights", _verdict(weights)]
    for side, names in (("base", weights.only_base), ("edited", weights.only_edited)):
        if names:
            parts.append(f"Only in {side}: {', '.join(names[:10])} ({len(names)} in all).")
    if weights.deltas:
        head = ["Tensor", "Shape", "Norm of delta", "Relative", "Rank", "Removes on", "Strength"]
        parts.append(markdown_table(head, [_delta_row(delta) for delta in weights.deltas[:SHOWN]]))
    if len(weights.deltas) > SHOWN:
        parts.append(f"{len(weights.deltas) - SHOWN} more differ; `--json` lists all.")
    return parts


def _verdict(weights: WeightDiff) -> str:
    ranks = Counter(
        "full rank" if delta.rank is None else f"rank {delta.rank}"
        for delta in weights.deltas
        if len(delta.shape) == 2
    )
    counted = ", ".join(f"{count} of {rank}" for rank, count in sorted(ranks.items()))
    description = {
        "identical": "No tensor differs.",
        "config": "No tensor differs, but what is computed with them does: see the config above.",
        "rounding": "No tensor differs by more than rounding to its dtype.",
        "directional": f"A directional edit of rank {weights.rank}: every matrix that differs "
        "removes the same directions on its output side.",
        "directional_by_block": f"A directional edit of rank {weights.rank}, block by block: every "
        "matrix that differs removes directions of its block's own on its output side.",
        "low_rank": "No directional edit: deltas have a low rank, but they do not remove one "
        "subspace on the output side. A LoRA looks like this.",
        "full_rank": "No directional edit: some delta has full rank. A fine-tune or noise looks "
        "like this.",
        "other": "No directional edit: tensors do not correspond, or cannot be compared.",
    }[weights.verdict]
    differ = f"{len(weights.deltas)} of {weights.compared} tensors differ"
    return f"{description} {differ}{f': {counted}' if counted else ''}."


def _delta_row(delta: TensorDelta) -> list[str]:
    matrix = len(delta.shape) == 2
    return [
        f"`{delta.name}`",
        " x ".join(map(str, delta.shape)),
        _number(delta.norm, ".3g"),
        _number(delta.relative, ".1e"),
        ("full" if delta.rank is None else str(delta.rank)) if matrix else "",
        delta.side or "",
        _number(delta.strength, ".2f") if delta.strength is not None else "",
    ]


def _behaviour(behaviour: Behaviour, apart: bool) -> str:
    rows = [
        [
            measure,
            *(cell(getattr(getattr(behaviour, s), measure)) for s in ("base", "edited")),
            "withheld" if apart else cell(getattr(behaviour.delta, measure), "+.3f"),
        ]
        for measure in MEASURES
    ]
    table = markdown_table(["Measure", "Base", "Edited", "Delta"], rows)
    unscored = [
        f"Unscored of {side}: {counted(reasons)}."
        for side, reasons in behaviour.unscored_reasons.items()
        if reasons
    ]
    return "\n\n".join([table, *unscored])


def _divergence(divergence: Divergence) -> str:
    rows = [
        ["KL(base, edited) of the first answer token, nats", cell(divergence.kl_first_token)],
        [f"KL per token of the first {divergence.tokens}, nats", cell(divergence.kl)],
        ["Same most likely token", cell(divergence.top1_agreement)],
        [
            f"Perplexity of base on {divergence.perplexity_tokens} tokens",
            _number(divergence.perplexity_base),
        ],
        ["Perplexity of edited", _number(divergence.perplexity_edited)],
    ]
    return markdown_table(["Measure", "Value"], rows)


def _benchmarks(results: dict[str, BenchmarkResult]) -> str:
    head = ["Task", "Metric", "Base", "Edited", "Delta", "Smallest detectable", "p", "p (Holm)"]
    head.append("Gold log-likelihood")
    rows = [
        [
            task,
            result.metric,
            cell(result.base),
            cell(result.edited),
            cell(result.delta, "+.3f"),
            _number(result.smallest_detectable),
            _number(result.p_value, ".2g"),
            _number(result.p_holm, ".2g"),
            cell(result.gold_loglik, "+.3f"),
        ]
        for task, result in results.items()
    ]
    return markdown_table(head, rows)


def _apart(results: dict[str, OwnScores]) -> str:
    rows = [
        [task, scores.metric, cell(scores.base), cell(scores.edited)]
        for task, scores in results.items()
    ]
    return markdown_table(["Task", "Metric", "Base", "Edited"], rows)


def _number(value: float | None, form: str = ".3f") -> str:
    return cell(value, form, absent="not known")
