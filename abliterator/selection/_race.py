"""Successive halving of a sweep's candidates."""

from __future__ import annotations

from collections.abc import Sequence

from abliterator import recipe
from abliterator.directions import AnyPlace, Node, Place
from abliterator.evaluation import EvaluationContext, JudgedAnswers
from abliterator.evaluation import race as race_candidates
from abliterator.record import Candidate, Rung
from abliterator.selection._pool import Pool
from abliterator.selection._scores import judge_edits
from abliterator.selection._step import OnStep, Step


def race(
    context: EvaluationContext,
    pool: Pool,
    candidates: Sequence[Candidate],
    settings: recipe.Selection,
    *,
    least: int,
    on_step: OnStep,
) -> list[Candidate]:
    """Judges `candidates` rung by rung, dropping the worst after each (`evaluation.race`).

    Args:
        context: the model and the prompts.
        pool: where the candidates' directions are.
        candidates: those to judge, none of them judged yet.
        settings: prompts of each rung, and the share that goes on.
        least: so many reach the last rung, if there are as many.
        on_step: called after each rung.

    Returns:
        All of them with what they answered, the best first: by rungs, then by product, then by KL.
    """

    def judge(chosen: Sequence[int], prompts: Sequence[int]) -> list[JudgedAnswers]:
        bases = [pool.stack([place_of(candidates[i])], 1).basis for i in chosen]
        return judge_edits(context, bases, prompts)

    def on_rung(racing: int, reached: int, answers: int) -> None:
        on_step(Step(f"{racing} candidates judged on {reached} prompts", answers))

    entrants = race_candidates(
        [candidate.kl for candidate in candidates],
        judge,
        settings,
        prompts=len(context.target.prompts),
        seed=context.seed,
        least=least,
        on_rung=on_rung,
    )
    return [_with_answers(candidates[e.index], e.judged, e.prompts) for e in entrants]


def place_of(candidate: Candidate) -> AnyPlace:
    """The layer and position of a candidate's direction, and its node if it is one."""
    if candidate.node is not None:
        return Node(candidate.layer, candidate.position, candidate.node)
    return Place(candidate.layer, candidate.position)


def _with_answers(
    candidate: Candidate, judged: Sequence[JudgedAnswers], prompts: Sequence[int]
) -> Candidate:
    rungs = tuple(
        Rung(prompts=reached, product=answers.summary.product)
        for answers, reached in zip(judged, prompts, strict=True)
    )
    return candidate.model_copy(update={"answers": judged[-1].summary, "rungs": rungs})
