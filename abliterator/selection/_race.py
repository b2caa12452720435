"""Successive halving: many candidates answer few prompts, few answer all."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from abliterator.directions import Place
from abliterator.evaluation import EvaluationContext, JudgedAnswers
from abliterator.record import Candidate, Rung
from abliterator.selection._pool import Pool
from abliterator.selection._scores import judge_edits
from abliterator.selection._types import Search

Step = Callable[[str], None]


def race(
    context: EvaluationContext,
    pool: Pool,
    candidates: Sequence[Candidate],
    search: Search,
    *,
    least: int,
    on_step: Step,
) -> list[Candidate]:
    """Judges `candidates` rung by rung, dropping the worst after each (Jamieson & Talwalkar 2016).

    An answer that was judged is never asked for again: a rung adds prompts to the one before it.
    Where a candidate that dropped out had a better product than the best has at last, it is judged
    on all prompts too, so that no leader wins by the luck of a short rung.

    Args:
        context: the model and the prompts.
        pool: where the candidates' directions are.
        candidates: those that are judged, all of the same worth so far.
        search: prompts of each rung, and the share that goes on.
        least: so many reach the last rung, if there are as many.
        on_step: called after each rung.

    Returns:
        All of them with what they answered, the best first: by rungs, then by product, then by KL.
    """
    total = len(context.target.prompts)
    order = random.Random(search.seed).sample(range(total), total)
    racing, out = list(candidates), list[Candidate]()
    answered: dict[Place, JudgedAnswers] = {}

    def by_answers(candidate: Candidate) -> tuple[float, float]:
        """Sorts the best first: the highest mean product, of equals the lowest KL."""
        judged = answered.get(place_of(candidate))
        return -judged.mean_product if judged else 0.0, candidate.kl

    def ask(some: Sequence[Candidate], done: int, reached: int) -> list[Candidate]:
        bases = [pool.stack([place_of(c)], 1).basis for c in some]
        judged = judge_edits(context, bases, order[done:reached])
        for c, more in zip(some, judged, strict=True):
            place = place_of(c)
            answered[place] = answered[place] + more if place in answered else more
        on_step(f"{len(some)} candidates judged on {reached} prompts")
        judged_now = [_after(c, answered[place_of(c)], reached) for c in some]
        return sorted(judged_now, key=by_answers)

    done = 0
    for n, reached in search.schedule(len(racing), total, least):
        racing, out = racing[:n], [*racing[n:], *out]
        racing = ask(racing, done, reached)
        done = reached
    # few prompts may have flattered the leader: who looked better when it dropped out comes back
    while out and by_answers(better := min(out, key=by_answers))[0] < by_answers(racing[0])[0]:
        out.remove(better)
        back = ask([better], better.rungs[-1].prompts, total)
        racing = sorted([*racing, *back], key=by_answers)
    return [*racing, *out]


def place_of(candidate: Candidate) -> Place:
    """Where a candidate's direction is from."""
    return Place(candidate.layer, candidate.position)


def _after(candidate: Candidate, judged: JudgedAnswers, prompts: int) -> Candidate:
    summary = judged.summary
    rung = Rung(prompts=prompts, product=summary.product)
    return candidate.model_copy(update={"answers": summary, "rungs": (*candidate.rungs, rung)})
