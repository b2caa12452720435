"""What a report shows of one build."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from abliterator.record import Completion, RunRecord, TensorEdit, Verdict


class SamplePair(NamedTuple):
    """One document of a benchmark task, base and edited.

    Attributes:
        doc_id: its number in the task.
        filter: the answer filter, where a task has several.
        base: value of the task's metric.
        edited: the same of the edited model.
        gold_base: log-likelihood of the right answer, nats; None where answers are generated.
        gold_edited: the same of the edited model.
        text_base: what was said, where the document is a conversation.
        text_edited: the same with the edited model.
    """

    doc_id: int
    filter: str
    base: float
    edited: float
    gold_base: float | None = None
    gold_edited: float | None = None
    text_base: str | None = None
    text_edited: str | None = None


@dataclass(frozen=True)
class Build:
    """The results of one build.

    Attributes:
        name: what it is called among others: the last name of its folder.
        record_text: record.json as it is stored, which the report offers to download.
        answers: of both sides, to the evaluation prompts.
        verdicts: of the recipe's judge, on each of them.
        by_rules: of the rule judge, where the recipe has another; its disagreement is shown.
        edits: the edited tensors.
        changes: |W' - W| / |W| of each of them by name; empty where the base is not at hand.
        gates: limits of the selection by the recipe's key: `max_kl`, `min_induce`.
        cosines: [L, L] between the directions of all layers, from the first on.
        groups: by prompt set and column, the group of each prompt; None of one without.
        flipped: documents of each benchmark task whose value changed.
    """

    name: str
    record_text: str
    answers: Sequence[Completion] = ()
    verdicts: Sequence[Verdict] = ()
    by_rules: Sequence[Verdict] = ()
    edits: Sequence[TensorEdit] = ()
    changes: Mapping[str, float] = field(default_factory=dict)
    gates: Mapping[str, float] = field(default_factory=dict)
    cosines: Sequence[Sequence[float]] = ()
    groups: Mapping[str, Mapping[str, Sequence[str | None]]] = field(default_factory=dict)
    flipped: Mapping[str, Sequence[SamplePair]] = field(default_factory=dict)

    @cached_property
    def record(self) -> RunRecord:
        """The record, as a typed value."""
        return RunRecord.model_validate_json(self.record_text)
