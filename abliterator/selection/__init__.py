"""Selection of layers, positions and k: candidates are scored, then the best are judged.

The model is never reloaded and its weights never change: every candidate is a preview of its edit
(hooks on the writers, equal to the baked weights), and many candidates share a batch, each in rows
of its own. The prompts on which the result will be measured are not known here.

    pool = Pool([Place(layer) for layer in range(1, 25)], {-1: directions})
    selection = choose(context, scoring, pool, sweep=True, k=1, settings=recipe.Selection())
    selection.layers[: selection.k], selection.why

After Arditi et al. (2024), section C: bypass, KL and induce scores, gates, then, beyond them,
judged answers by successive halving, and stacks that must beat random directions and those of
shuffled labels.
"""

from __future__ import annotations

from collections.abc import Sequence

from abliterator import recipe
from abliterator.directions import nodes_of
from abliterator.evaluation import EvaluationContext
from abliterator.record import Candidate, Selection, Stack
from abliterator.selection._grow import grow_stack, largest_better
from abliterator.selection._openings import FARTHEST, learn_openings, log_odds
from abliterator.selection._pool import Pool
from abliterator.selection._race import place_of
from abliterator.selection._scores import (
    KL_TOKENS,
    ScoringPrompts,
    judge_edits,
    measure_base,
)
from abliterator.selection._step import OnStep, Step
from abliterator.selection._structure import describe, participation_ratio
from abliterator.selection._sweep import require_enough, sweep_places

__all__ = [
    "FARTHEST",
    "KL_TOKENS",
    "Pool",
    "ScoringPrompts",
    "Step",
    "choose",
    "judge_edits",
    "learn_openings",
    "log_odds",
    "participation_ratio",
]


def choose(
    context: EvaluationContext,
    scoring: ScoringPrompts,
    pool: Pool,
    *,
    sweep: bool,
    k: int | Sequence[int],
    settings: recipe.Selection,
    on_step: OnStep = lambda step: None,
) -> Selection:
    """Chooses places, k, or both.

    Args:
        context: the model, and the held-out prompts on which candidates are judged.
        scoring: the prompts by which they are scored before.
        pool: the candidates, from prompts that are not among `context.target`.
        sweep: whether to rank them.
        k: how many are stacked, or the sizes to try.
        settings: the recipe's section: gates, number of candidates, rungs and controls.
        on_step: called with each step that is done.

    Raises:
        PromptError: if the base does not refuse.
        DirectionError: if no candidate passes, fewer than k do, or directions are dependent.
    """
    sizes = (k,) if isinstance(k, int) else tuple(k)
    needed, stackable = (1, 1) if pool.of_one_place else (sizes[0], max(sizes))
    base = measure_base(context, scoring)
    on_step(Step("base measured", len(context.target.prompts) + len(scoring.contrast.prompts)))
    candidates: list[Candidate] = []
    order = list(pool.places)
    if sweep:
        candidates = sweep_places(
            context,
            base,
            pool,
            settings,
            least=needed,
            stackable=stackable,
            on_step=on_step,
        )
        require_enough(candidates, needed)
        order = [place_of(candidate) for candidate in candidates if not candidate.stopped_by]
    stacks: list[Stack] = []
    selected_k, why = sizes[0], "k is the recipe's"
    if not isinstance(k, int):
        stacks, why = grow_stack(context, base, pool, order, sizes, settings, on_step=on_step)
        selected_k = largest_better(stacks, settings)
    best = [place_of(candidate) for candidate in candidates if candidate.answers] or order
    return Selection(
        layers=tuple(place.layer for place in order),
        positions=tuple(place.position for place in order),
        nodes=nodes_of(order),
        k=selected_k,
        why=why,
        base=base.recorded,
        candidates=tuple(candidates),
        stacks=tuple(stacks),
        structure=describe(pool, best=best, stacks=stacks, k=selected_k),
        rollout_tokens=base.tokens + _generated(candidates, stacks),
    )


def _generated(candidates: Sequence[Candidate], stacks: Sequence[Stack]) -> int:
    """Tokens of all judged answers; `answers` of a candidate hold those of all its rungs."""
    answers = [c.answers for c in candidates if c.answers]
    answers += [a for s in stacks for a in (s.answers, s.random, s.shuffled) if a]
    return sum(a.tokens for a in answers)
