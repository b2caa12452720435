"""Renders a comparison as Markdown; `comparison.md.jinja` is what a reader sees."""

from __future__ import annotations

import re
from collections import Counter

from abliterator.judge import counted
from abliterator.record import Comparison, Difference, TensorDelta, WeightDiff
from abliterator.tables import cell

SHOWN = 200  # rows of a table; the JSON has them all
LARGEST = 5  # tensors that are listed without `details`
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


def to_markdown(comparison: Comparison, *, details: bool = False) -> str:
    """The comparison as Markdown; an estimate is `value [95 % interval] (n=40)`.

    Of the tensors that differ, the `LARGEST` changes are listed; with `details` the first `SHOWN`.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("abliterator", "comparison"),
        autoescape=False,  # that would be HTML's escape, which is not Markdown's
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"cell": cell, "code": _code, "counted": counted, "number": _number}
    text = environment.get_template("comparison.md.jinja").render(
        dict(comparison),
        parts=_PARTS,
        other_vocabulary=OTHER_VOCABULARY,
        ranks=_ranks(comparison.weights),
        shown=SHOWN,
        deltas=comparison.weights.deltas[:SHOWN] if details else _largest(comparison.weights),
    )
    return text.rstrip("\n") + "\n"


def difference_line(difference: Difference) -> str:
    """A difference beside the weights, on one line."""
    sides = ("none" if side is None else side for side in (difference.base, difference.edited))
    return f"{_PARTS[difference.part]}, {difference.name}: {' -> '.join(sides)}"


def _code(text: str | None) -> str:
    """Text of a checkpoint in a cell of a table, as code."""
    if text is None:
        return "none"
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    inside = text.replace("|", "\\|")
    return f"{ticks} {inside} {ticks}" if len(ticks) > 1 else f"`{inside}`"


def _largest(weights: WeightDiff) -> list[TensorDelta]:
    """The tensors with the largest relative change; of equal ones, the first."""
    by_change = sorted(weights.deltas, key=lambda delta: -(delta.relative or 0.0))
    return by_change[:LARGEST]


def _ranks(weights: WeightDiff) -> str:
    """How many matrices differ by a delta of each rank."""
    ranks = Counter(
        "full rank" if delta.rank is None else f"rank {delta.rank}"
        for delta in weights.deltas
        if len(delta.shape) == 2
    )
    return ", ".join(f"{count} of {rank}" for rank, count in sorted(ranks.items()))


def _number(value: float | None, form: str = ".3f") -> str:
    return cell(value, form, absent="not known")
