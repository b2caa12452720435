"""The model, the prompts, the judge and the limits with which edits are measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from abliterator.bake import EditPlan
from abliterator.engines import Engine, WriterEdit
from abliterator.judge import Judge
from abliterator.prompts import Prompt

if TYPE_CHECKING:
    from torch import Tensor


class RenderedPrompts(NamedTuple):
    """Prompts as they were written, and the token ids of each in a chat, in one order."""

    prompts: Sequence[Prompt]
    token_ids: Sequence[Sequence[int]]

    def at(self, indices: Sequence[int]) -> RenderedPrompts:
        """The prompts at `indices`."""
        return RenderedPrompts(
            [self.prompts[i] for i in indices], [self.token_ids[i] for i in indices]
        )


@dataclass(frozen=True)
class EvaluationContext:
    """The base, the plan of its edits, and the prompts on which edits are measured.

    Attributes:
        engine: the base model; its weights never change.
        plan: which writers are edited, and how strongly.
        target: prompts on which the behaviour shows; their answers are judged, and no direction was
            taken from them.
        neutral: prompts whose answers must stay: divergence is measured along the base's answers.
        judge: of the answers to target prompts.
        max_new_tokens: of a judged answer; also of the thinking before a compared one.
        kl_tokens: answer tokens compared of each neutral prompt, at most.
        batch_size: prompts answered together; None for the engine's choice.
        max_batch_tokens: tokens in one forward pass.
        seed: of the intervals.
    """

    engine: Engine
    plan: EditPlan
    target: RenderedPrompts
    neutral: RenderedPrompts
    judge: Judge
    max_new_tokens: int
    kl_tokens: int
    batch_size: int | None
    max_batch_tokens: int = 4096
    seed: int = 0

    def writer_edit(self, basis: Tensor) -> WriterEdit:
        """The edit that removes Q [H, k], or [L, H, k], at the strengths of the plan."""
        return WriterEdit(self.plan, basis)
