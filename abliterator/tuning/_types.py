"""Inputs of tuning, and tuned edits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from abliterator.bake import EditPlan
from abliterator.engines import Steering, Tokens, WriterEdit
from abliterator.errors import DirectionError
from abliterator.evaluation import EvaluationContext, RenderedPrompts
from abliterator.recipe import Tuning

if TYPE_CHECKING:
    from torch import Tensor

    from abliterator.model import LoadedModel


class Row(NamedTuple):
    """A rendered prompt and an answer that follows it."""

    prompt: Tokens
    answer: Tokens


@dataclass(frozen=True)
class TuningContext:
    """Inputs of tuning: a model with gradients, and prompts to learn from and to measure on.

    Attributes:
        evaluation: the held-out prompts on which trials are measured, the judge and the plan, whose
            strengths are where the plain edit would put them.
        loaded: the model of the evaluation's engine. Gradients flow through transformers' modules;
            no weight changes.
        target: prompts on which the behaviour shows; preference pairs are made of them.
        neutral: prompts whose answers must stay: neutral ones, and the contrast.
        config: the recipe's section.
        strengths: whether each writer's strength is tuned; else all stay at the plan's.
        directions: whether the directions are tuned; else they stay where they started.
        difference: the mean difference at the start's layer, where the config has `induce`.

    Raises:
        DirectionError: for `induce` without it.
    """

    evaluation: EvaluationContext
    loaded: LoadedModel
    target: RenderedPrompts
    neutral: RenderedPrompts
    config: Tuning
    strengths: bool = True
    directions: bool = True
    difference: Steering | None = None

    def __post_init__(self) -> None:
        """Checks that what the config asks for is given."""
        if self.config.induce and self.difference is None:
            raise DirectionError(
                "`tuning.induce` adds the direction at the length of the mean difference, and "
                "none is given. Give `TuningContext.difference`."
            )

    @property
    def plan(self) -> EditPlan:
        """Which writers may be edited."""
        return self.evaluation.plan


class PreferencePair(NamedTuple):
    """A target prompt, an answer that a judge accepted, and answers to make less likely.

    Attributes:
        place: of the prompt among the target prompts.
        prompt: rendered.
        answer: what a judge accepted, from its beginning.
        refusal: the base's own, from its beginning.
        rejected: answers of intermediate edits that the judge rejected, the latest first.
    """

    place: int
    prompt: Tokens
    answer: Tokens
    refusal: Tokens
    rejected: tuple[Tokens, ...] = ()


@dataclass(frozen=True)
class PreferencePairs:
    """The training data: refusals against answers, and answers that must stay.

    Attributes:
        target: at least `LEAST_PAIRS`.
        neutral: the base's own greedy answers.
    """

    target: tuple[PreferencePair, ...]
    neutral: tuple[Row, ...]


class TunedEdit(NamedTuple):
    """An edit: Q, or U and V of each writer, and one strength a writer.

    Attributes:
        basis: Q [H, k] float64, orthonormal columns; or [L, H, k] with one a block; or pairs
            [M, 2, H, r], whose numbers float32 holds.
        strengths: by module path of the writer.
    """

    basis: Tensor
    strengths: Mapping[str, float]

    def of(self, plan: EditPlan) -> WriterEdit:
        """As an edit of the writers that `plan` names."""
        return WriterEdit(plan, self.basis, self.strengths)

    def scaled(self, factor: float) -> TunedEdit:
        """The edit with strengths times `factor`, rounded to four decimals."""
        return TunedEdit(self.basis, {m: round(factor * s, 4) for m, s in self.strengths.items()})
