"""The table across models: one row for each base, from the best of its builds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from abliterator.record import Estimate, RunRecord
from abliterator.report._build import Build


class ModelRow(NamedTuple):
    """A base model and the build of it that complies most.

    Attributes:
        model: the base.
        sufficient: whether a single direction is enough: "yes", "no" or "not measured".
        because: the measurement that says so.
        best: the build with the highest compliance on target prompts.
        builds: how many builds of this base there are.
    """

    model: str
    sufficient: str
    because: str
    best: RunRecord
    builds: int


def model_rows(builds: Sequence[Build]) -> list[ModelRow]:
    """One row for each base model, in the order in which they first occur."""
    by_model: dict[str, list[RunRecord]] = {}
    for build in builds:
        by_model.setdefault(build.record.model.id, []).append(build.record)
    return [
        ModelRow(model, *_sufficient(records), max(records, key=_compliance), len(records))
        for model, records in by_model.items()
    ]


def compliance(record: RunRecord) -> Estimate | None:
    """Compliance of the edited model on target prompts."""
    target = record.behaviour.get("target")
    return None if target is None else target.edited.compliance


def _compliance(record: RunRecord) -> float:
    measured = compliance(record)
    return -1.0 if measured is None else measured.value


def _sufficient(records: Sequence[RunRecord]) -> tuple[str, str]:
    """Whether one direction is enough, by a selection, or by builds with one and with several."""
    for record in records:
        if record.selection is not None and record.selection.stacks:
            structure = record.selection.structure
            is_single = structure.verdict == "single direction"
            return "yes" if is_single else "no", f"{structure.verdict}: {structure.because}"
    single = [c for r in records if r.edit.k == 1 and (c := compliance(r))]
    stacked = [c for r in records if r.edit.k > 1 and (c := compliance(r))]
    if not (single and stacked):
        return "not measured", "no selection of k, and no builds with one and with several"
    one, several = (max(rates, key=lambda rate: rate.value) for rates in (single, stacked))
    because = f"compliance {one:.3f} with one direction, {several:.3f} with several"
    is_apart = several.low is not None and one.high is not None and several.low > one.high
    return "no" if is_apart else "yes", because
