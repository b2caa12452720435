"""Trials measured on held-out prompts: divergence of all, then answers by successive halving."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from abliterator.engines import Answer, AnswerPath, Engine, SideBySide, WriterEdit
from abliterator.errors import UnsupportedModel
from abliterator.evaluation import (
    EvaluationContext,
    JudgedAnswers,
    LogitFile,
    OnStep,
    WholeFront,
    base_paths,
    judge_answers,
    race,
)
from abliterator.record import Trial, Verdict
from abliterator.tuning._kept import KeptSteps
from abliterator.tuning._trials import mean_divergence, trial_of
from abliterator.tuning._types import TunedEdit, TuningContext

if TYPE_CHECKING:
    from torch import Tensor

    from abliterator.recipe import Selection


class Candidate(NamedTuple):
    """A tuned edit to be measured: the weight of the KL, the scale of its strengths, the edit."""

    kl_weight: float
    scale: float
    edit: TunedEdit


def measure(
    context: TuningContext,
    candidates: Sequence[Candidate],
    settings: Selection,
    *,
    scratch: Path,
    kept: KeptSteps,
    on_step: OnStep,
) -> list[Trial]:
    """Each candidate on held-out prompts; the first is the start edit.

    The divergence is that of all. Answers are judged rung by rung, and candidates that others beat
    in both drop out (`evaluation.race`): their estimates are over fewer prompts.

    Args:
        context: the model, the prompts and the judge.
        candidates: edits of one plan.
        settings: prompts of each rung, and the share that goes on.
        scratch: a file for the base's logits on held-out neutral prompts; it is deleted.
        kept: steps that an interrupted measurement of the same candidates finished.
        on_step: called with each step that is done.
    """
    evaluation = context.evaluation
    edits = [candidate.edit.of(context.plan) for candidate in candidates]

    def divergence() -> Any:
        values = _divergence(evaluation, edits, scratch)
        on_step(f"divergence of {len(edits)} trials")
        return values

    def judged(chosen: Sequence[int], prompts: Sequence[int]) -> Any:
        of_edits = _verdicts(evaluation, [edits[i] for i in chosen], prompts)
        on_step(f"{len(chosen)} trials judged")
        return [[v.model_dump(mode="json") for v in verdicts] for verdicts in of_edits]

    def judge(chosen: Sequence[int], prompts: Sequence[int]) -> list[JudgedAnswers]:
        of_edits = kept.value("rung", partial(judged, chosen, prompts))
        # the answers themselves are not kept
        return [JudgedAnswers((), tuple(map(Verdict.model_validate, v))) for v in of_edits]

    moved = kept.value("divergence", divergence)
    entrants = race(
        [kl for kl, _ in moved],
        judge,
        settings,
        prompts=len(evaluation.target.prompts),
        seed=evaluation.seed,
        objective=WholeFront(),
    )
    summaries = {e.index: e.judged[-1].summary for e in entrants}
    start = candidates[0].edit.basis
    return [
        trial_of(summaries[i], moved[i], start, c.edit.basis, kl_weight=c.kl_weight, scale=c.scale)
        for i, c in enumerate(candidates)
    ]


def _divergence(
    evaluation: EvaluationContext, edits: Sequence[WriterEdit], scratch: Path
) -> list[tuple[float, float]]:
    """KL along the base's answers of each edit: of all tokens, and of first tokens."""
    paths = base_paths(
        evaluation.engine,
        evaluation.neutral.token_ids,
        tokens=evaluation.kl_tokens,
        max_new_tokens=evaluation.max_new_tokens,
        batch_size=evaluation.batch_size,
        share_prefix=True,
    )
    limit = evaluation.max_batch_tokens
    with LogitFile(scratch) as base:
        logits = evaluation.engine.logits(paths, max_batch_tokens=limit, share_prefix=True)
        base.write(paths, logits)
        with _edited(evaluation, edits) as edited:
            each = ((i * len(paths) + p, logits) for i, p, logits in edited.logits(paths))
            compared = base.compare(paths * len(edits), each)
    n = len(paths)
    return [mean_divergence(compared[i : i + n]) for i in range(0, len(compared), n)]


def _verdicts(
    evaluation: EvaluationContext, edits: Sequence[WriterEdit], prompts: Sequence[int]
) -> list[tuple[Verdict, ...]]:
    """Verdicts on the answers to some held-out prompts under each edit."""
    target = evaluation.target.at(prompts)
    with _edited(evaluation, edits) as edited:
        answers = edited.answers(
            target.token_ids,
            max_new_tokens=evaluation.max_new_tokens,
            batch_size=evaluation.batch_size,
        )
    return [judge_answers(evaluation, target, of_edit).verdicts for of_edit in answers]


@contextmanager
def _edited(
    evaluation: EvaluationContext, edits: Sequence[WriterEdit]
) -> Iterator[SideBySide | _EditsInTurn]:
    """The model under several edits: in rows of one batch where its experts allow it."""
    engine, limit = evaluation.engine, evaluation.max_batch_tokens
    with ExitStack() as stack:
        edited: SideBySide | _EditsInTurn
        try:
            edited = stack.enter_context(engine.edited_side_by_side(edits, max_batch_tokens=limit))
        except UnsupportedModel:
            edited = _EditsInTurn(engine, edits, limit)
        yield edited


@dataclass(frozen=True)
class _EditsInTurn:
    """A model under several edits, one after the other (`engines.SideBySide`)."""

    engine: Engine
    edits: Sequence[WriterEdit]
    max_batch_tokens: int

    def answers(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, batch_size: int | None
    ) -> list[list[Answer]]:
        """Greedy answers to `prompts`, for each edit."""
        answers = []
        for edit in self.edits:
            with self.engine.edited(edit):
                answers.append(
                    self.engine.answers(
                        prompts,
                        max_new_tokens=max_new_tokens,
                        batch_size=batch_size,
                        share_prefix=True,
                    )
                )
        return answers

    def logits(self, paths: Sequence[AnswerPath]) -> Iterator[tuple[int, int, Tensor]]:
        """Logits along given answers: edit, index of the path, [positions, V] on the CPU."""
        for i, edit in enumerate(self.edits):
            with self.engine.edited(edit):
                for path, logits in self.engine.logits(
                    paths, max_batch_tokens=self.max_batch_tokens, share_prefix=True
                ):
                    yield i, path, logits
