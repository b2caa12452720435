"""The limits that a recipe sets for what is published, against what was measured."""

from __future__ import annotations

from collections.abc import Iterator

from abliterator.errors import PublishError
from abliterator.recipe import Requirements
from abliterator.record import RunRecord


def require_measured(record: RunRecord) -> None:
    """Raises PublishError where a figure is beyond the recipe's `publish.require`, or missing."""
    section = record.recipe.get("publish", {}).get("require", {})
    problems = list(_problems(record, Requirements.model_validate(section)))
    if problems:
        raise PublishError(
            "The recipe's `publish.require` is not met: " + "; ".join(problems) + ". Build a "
            "better edit, or change the limits in the recipe and build again."
        )


def _problems(record: RunRecord, limits: Requirements) -> Iterator[str]:
    target, divergence = record.behaviour.get("target"), record.divergence
    refusal = target.edited.refusal if target else None
    kl = divergence.kl_first_token if divergence else None
    for name, estimate, limit in (
        ("refusal", refusal, limits.refusal_at_most),
        ("kl", kl, limits.kl_at_most),
    ):
        yield from _problem(name, estimate.value if estimate else None, limit)
    if limits.benchmark_loss_at_most is None:
        return
    if not record.benchmarks:
        yield from _problem("benchmark_loss", None, limits.benchmark_loss_at_most)
    for task, result in record.benchmarks.items():
        loss = -result.delta.value if result.higher_is_better else result.delta.value
        yield from _problem("benchmark_loss", loss, limits.benchmark_loss_at_most, f" of {task}")


def _problem(name: str, value: float | None, limit: float | None, of: str = "") -> Iterator[str]:
    if limit is None:
        return
    if value is None:
        yield f"`{name}_at_most` is {limit:g}, and this was not measured"
    elif value > limit:
        yield f"{name}{of} is {value:.3f}, {value - limit:.3f} above `{name}_at_most: {limit:g}`"
