"""Which layers, and how many: candidates tried on one loaded model, cheap scores before answers.

The model is never reloaded and its weights never change: every candidate is a preview of its edit
(hooks on the writers, equal to the baked weights). The room does not know recipes or files, nor the
prompts on which the result will be measured.

    found = choose(
        subject, directions, layers=range(1, 25), sweep=True, k=1, gates=Gates(), n_judged=4
    )
    found.layers[: found.k], found.why

After Arditi et al. (2024), section C: bypass, KL and induce scores, gates, then what they do not
do: judged answers, and stacks that must beat random directions.
"""

from __future__ import annotations

from collections.abc import Sequence

from abliterator.directions import Directions
from abliterator.selection._grow import grow_stack, random_basis, taken
from abliterator.selection._openings import learn_openings, refusal_scores
from abliterator.selection._scores import judge_edit, measure_base
from abliterator.selection._structure import describe, participation_ratio
from abliterator.selection._sweep import Step, require_enough, sweep_layers
from abliterator.selection._types import Asked, Candidate, Gates, Selection, Stack, Subject

__all__ = [
    "Asked",
    "Candidate",
    "Gates",
    "Selection",
    "Stack",
    "Subject",
    "choose",
    "judge_edit",
    "learn_openings",
    "participation_ratio",
    "random_basis",
    "refusal_scores",
]


def choose(
    subject: Subject,
    directions: Directions,
    *,
    layers: Sequence[int],
    sweep: bool,
    k: int | Sequence[int],
    gates: Gates,
    n_judged: int,
    seed: int = 0,
    on_step: Step = lambda what: None,
) -> Selection:
    """Chooses layers, k, or both.

    Args:
        subject: the model and the prompts.
        directions: one a layer, taken from prompts that are not among `subject.held_out`.
        layers: the candidates; without a sweep, in order of preference.
        sweep: whether to find the order.
        k: how many are stacked; to find out, the sizes to try.
        gates: what a candidate must pass.
        n_judged: candidates whose answers are judged; at least as many as may be stacked.
        seed: of intervals and random directions.
        on_step: called with each step that is done.

    Raises:
        PromptError: if the base does not refuse.
        DirectionError: if no layer passes, fewer than k do, or directions are dependent.
    """
    sizes = (k,) if isinstance(k, int) else tuple(k)
    base = measure_base(subject)
    on_step("base measured")
    candidates: list[Candidate] = []
    order = list(layers)
    if sweep:
        candidates = sweep_layers(
            subject,
            base,
            directions,
            layers,
            gates=gates,
            n_judged=max(n_judged, *sizes),
            on_step=on_step,
        )
        require_enough(candidates, sizes[0])
        order = [c.layer for c in candidates if not c.stopped_by]
    stacks: list[Stack] = []
    chosen, why = sizes[0], "k is the recipe's"
    if not isinstance(k, int):
        stacks, why = grow_stack(
            subject, base, directions, order, sizes, gates=gates, seed=seed, on_step=on_step
        )
        chosen = taken(stacks, gates)
    return Selection(
        layers=tuple(order),
        k=chosen,
        why=why,
        base=base.recorded,
        candidates=tuple(candidates),
        stacks=tuple(stacks),
        structure=describe(
            directions,
            layers=sorted(layers),
            best=[c.layer for c in candidates if c.answers] or order,
            stacks=stacks,
            k=chosen,
        ),
        rollout_tokens=base.tokens + _generated(candidates, stacks),
    )


def _generated(candidates: Sequence[Candidate], stacks: Sequence[Stack]) -> int:
    of_layers = sum(c.answers.tokens for c in candidates if c.answers)
    return of_layers + sum(s.answers.tokens + s.random.tokens for s in stacks)
