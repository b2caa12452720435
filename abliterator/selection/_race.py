"""Successive halving: many candidates answer few prompts, few answer all prompts."""

from __future__ import annotations

import random
from collections.abc import Sequence

from abliterator import recipe
from abliterator.directions import AnyPlace, Node, Place
from abliterator.evaluation import EvaluationContext, JudgedAnswers
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
    """Judges `candidates` rung by rung, dropping the worst after each (Jamieson & Talwalkar 2016).

    An answer that was judged is never asked for again: a rung adds prompts to the one before it.
    Where a candidate that dropped out had a better product than the best has at last, it is judged
    on all prompts too, so that none wins by chance on the few prompts of a short rung.

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
    total = len(context.target.prompts)
    order = random.Random(context.seed).sample(range(total), total)
    racing, dropped = list(candidates), list[Candidate]()
    answered: dict[AnyPlace, JudgedAnswers] = {}

    def by_answers(candidate: Candidate) -> tuple[float, float]:
        """Sorts the best first: the highest mean product, of equals the lowest KL."""
        judged = answered.get(place_of(candidate))
        return -judged.mean_product if judged else 0.0, candidate.kl

    def judge_more(chosen: Sequence[Candidate], first_prompt: int, reached: int) -> list[Candidate]:
        bases = [pool.stack([place_of(c)], 1).basis for c in chosen]
        judged = judge_edits(context, bases, order[first_prompt:reached])
        for c, new in zip(chosen, judged, strict=True):
            place = place_of(c)
            answered[place] = answered[place] + new if place in answered else new
        name = f"{len(chosen)} candidates judged on {reached} prompts"
        on_step(Step(name, len(chosen) * (reached - first_prompt)))
        judged_now = [_with_answers(c, answered[place_of(c)], reached) for c in chosen]
        return sorted(judged_now, key=by_answers)

    first_prompt = 0
    for n_racing, reached in settings.schedule(len(racing), total, least):
        racing, dropped = racing[:n_racing], [*racing[n_racing:], *dropped]
        racing = judge_more(racing, first_prompt, reached)
        first_prompt = reached
    # few prompts are noisy: a candidate that dropped out with a better product is judged on all
    while (
        dropped
        and by_answers(comeback := min(dropped, key=by_answers))[0] < by_answers(racing[0])[0]
    ):
        dropped.remove(comeback)
        rejudged = judge_more([comeback], comeback.rungs[-1].prompts, total)
        racing = sorted([*racing, *rejudged], key=by_answers)
    return [*racing, *dropped]


def place_of(candidate: Candidate) -> AnyPlace:
    """The layer and position of a candidate's direction, and its node if it is one."""
    if candidate.node is not None:
        return Node(candidate.layer, candidate.position, candidate.node)
    return Place(candidate.layer, candidate.position)


def _with_answers(candidate: Candidate, judged: JudgedAnswers, prompts: int) -> Candidate:
    summary = judged.summary
    rung = Rung(prompts=prompts, product=summary.product)
    return candidate.model_copy(update={"answers": summary, "rungs": (*candidate.rungs, rung)})
