"""Measures edits of one loaded model against the base, which is measured once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from abliterator.engines import Edit
from abliterator.evaluation._answers import JudgedAnswers, answer_and_judge
from abliterator.evaluation._context import EvaluationContext
from abliterator.evaluation._paths import (
    LogitFile,
    PathDivergence,
    base_paths,
    summarise_divergence,
)
from abliterator.record import Divergence

OnStep = Callable[[str], None]


class MeasuredEdit(NamedTuple):
    """Judged answers to target prompts under one edit, and its divergence on every neutral path."""

    judged: JudgedAnswers
    paths: list[PathDivergence]
    divergence: Divergence


class EditEvaluator:
    """Measures answers and divergence of edits; a context that keeps the base's logits in a file.

    with EditEvaluator(context, scratch) as evaluator:
        evaluator.measure("half", WriterEdit(plan, basis)).divergence.kl
    """

    def __init__(
        self, context: EvaluationContext, scratch: Path, on_step: OnStep = lambda name: None
    ) -> None:
        """Takes the context, a file for the base's logits, and a callback for each step."""
        self.context, self.on_step = context, on_step
        self._logits = LogitFile(scratch)

    def __enter__(self) -> EditEvaluator:
        """Measures the base."""
        context = self.context
        self.base = answer_and_judge(context, context.target, side="base")
        self._paths = base_paths(
            context.engine,
            context.neutral.token_ids,
            tokens=context.kl_tokens,
            max_new_tokens=context.max_new_tokens,
            batch_size=context.batch_size,
        )
        limit = context.max_batch_tokens
        self._logits.write(self._paths, context.engine.logits(self._paths, max_batch_tokens=limit))
        self.on_step("base")
        return self

    def __exit__(self, *_: object) -> None:
        """Deletes the base's logits."""
        self._logits.__exit__()

    def measure(self, name: str, edit: Edit) -> MeasuredEdit:
        """Measures the model under an edit; `name` is for progress."""
        context = self.context
        with context.engine.edited(edit):
            judged = answer_and_judge(context, context.target)
            paths = self._diverge()
        self.on_step(name)
        divergence = summarise_divergence(paths, tokens=context.kl_tokens, seed=context.seed)
        return MeasuredEdit(judged, paths, divergence)

    def kl(self, name: str, edit: Edit) -> float:
        """KL of the model under an edit alone, without answers: nats a token, mean over prompts."""
        with self.context.engine.edited(edit):
            paths = self._diverge()
        self.on_step(name)
        return mean(float(path.kl.mean()) for path in paths)

    def _diverge(self) -> list[PathDivergence]:
        """The divergence of the model under the present edit on every neutral path."""
        limit = self.context.max_batch_tokens
        logits = self.context.engine.logits(self._paths, max_batch_tokens=limit)
        return self._logits.compare(self._paths, logits)
