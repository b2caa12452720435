"""One candidate a layer: scored cheaply, gated, and the best few judged by their answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from abliterator.directions import Directions, stack
from abliterator.errors import DirectionError
from abliterator.selection._scores import Baseline, judge_edit, score
from abliterator.selection._types import Candidate, Gates, Subject

Step = Callable[[str], None]


def sweep_layers(
    subject: Subject,
    base: Baseline,
    directions: Directions,
    layers: Sequence[int],
    *,
    gates: Gates,
    n_judged: int,
    on_step: Step,
) -> list[Candidate]:
    """Every one of `layers` as a candidate, in order of preference.

    Judged ones first, by mean product (ties by lower KL), then by bypass the others that passed,
    then those that a gate stopped.

    Raises:
        DirectionError: when no candidate passes, and for a direction of no length.
    """
    found = []
    for layer in layers:
        scored = score(
            subject,
            base,
            layer=layer,
            direction=directions.vectors[layer - 1],
            basis=stack(directions, (layer,)).basis,
        )
        found.append(scored.model_copy(update={"stopped_by": stopped_by(scored, gates)}))
        on_step(f"layer {layer} scored")
    passed = sorted((c for c in found if not c.stopped_by), key=lambda c: (c.bypass, c.kl))
    if not passed:
        raise DirectionError(none_passed(found, gates))
    judged = []
    for candidate in passed[:n_judged]:
        answers = judge_edit(subject, stack(directions, (candidate.layer,)).basis).summary
        judged.append(candidate.model_copy(update={"answers": answers}))
        on_step(f"layer {candidate.layer} judged")
    stopped = [candidate for candidate in found if candidate.stopped_by]
    return [*sorted(judged, key=_by_answers), *passed[n_judged:], *stopped]


def _by_answers(candidate: Candidate) -> tuple[float, float]:
    answers = candidate.answers
    product = answers.product.value if answers and answers.product else 0.0
    return -product, candidate.kl


def stopped_by(candidate: Candidate, gates: Gates) -> tuple[str, ...]:
    """Names of the gates that a candidate does not pass."""
    failed = {
        "max_kl": candidate.kl > gates.max_kl,
        "min_induce": candidate.induce < gates.min_induce,
    }
    return tuple(name for name, fails in failed.items() if fails)


def none_passed(candidates: Sequence[Candidate], gates: Gates) -> str:
    """Why there is no choice: what stopped each candidate, and what the nearest one needs."""
    kl = [f"{c.layer} ({c.kl:.3g})" for c in candidates if "max_kl" in c.stopped_by]
    induce = [f"{c.layer} ({c.induce:.3g})" for c in candidates if "min_induce" in c.stopped_by]
    reasons = []
    if kl:
        reasons.append(f"`max_kl` {gates.max_kl:g} stops layers {', '.join(kl)}")
    if induce:
        reasons.append(f"`min_induce` {gates.min_induce:g} stops layers {', '.join(induce)}")
    nearest = min(candidates, key=lambda c: (len(c.stopped_by), c.kl, -c.induce))
    # rounded to the side that lets it pass
    needs = {
        "max_kl": f"selection.max_kl={nearest.kl * 1.01:.3g}",
        "min_induce": f"selection.min_induce={nearest.induce - 0.01 * abs(nearest.induce):.3g}",
    }
    asked = " ".join(f"--set {needs[name]}" for name in nearest.stopped_by)
    return (
        f"No layer passes the gates of `selection`: {'; '.join(reasons)}. The nearest is layer "
        f"{nearest.layer}, which needs {asked}. Lower `edit.strength`, give target and contrast "
        f"prompts that differ in the behaviour alone, or move the gate."
    )


def require_enough(candidates: Sequence[Candidate], k: int) -> None:
    """Raises DirectionError if fewer layers passed than are to be stacked."""
    passed = [c.layer for c in candidates if not c.stopped_by]
    if len(passed) < k:
        raise DirectionError(
            f"`k` is {k}, but only {len(passed)} of {len(candidates)} candidate layers pass the "
            f"gates of `selection` ({', '.join(map(str, passed))}). Give a smaller k, or `k: auto`."
        )
