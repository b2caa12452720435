"""A sweep: candidates are scored and gated, and the best few are judged by their answers."""

from __future__ import annotations

from collections.abc import Sequence

from abliterator import recipe
from abliterator.errors import DirectionError
from abliterator.evaluation import EvaluationContext
from abliterator.record import Candidate
from abliterator.selection._pool import Pool
from abliterator.selection._race import place_of, race
from abliterator.selection._scores import Baseline, score
from abliterator.selection._step import OnStep, Step


def sweep_places(
    context: EvaluationContext,
    base: Baseline,
    pool: Pool,
    settings: recipe.Selection,
    *,
    least: int,
    stackable: int,
    on_step: OnStep,
) -> list[Candidate]:
    """Every place of `pool` as a candidate, in order of preference.

    Judged ones first, as `race` ranks them, then by bypass the others that passed, then those that
    a gate stopped.

    Args:
        context: the model and the prompts.
        base: from `measure_base`.
        pool: the candidates and their directions.
        settings: gates, and how many are judged on how many prompts.
        least: so many are judged on all prompts.
        stackable: so many are judged at all, if that is more than `settings.survivors`.
        on_step: called with each step that is done.

    Raises:
        DirectionError: when no candidate passes, and for a direction of no length.
    """
    candidates = [
        scored.model_copy(update={"stopped_by": stopped_by(scored, settings)})
        for scored in score(context, base, pool)
    ]
    on_step(Step(f"{len(candidates)} candidates scored", 0))
    passed = sorted((c for c in candidates if not c.stopped_by), key=lambda c: (c.bypass, c.kl))
    if not passed:
        raise DirectionError(none_passed(candidates, settings))
    entering = max(settings.survivors, stackable)
    judged = race(context, pool, passed[:entering], settings, least=least, on_step=on_step)
    stopped = [candidate for candidate in candidates if candidate.stopped_by]
    return [*judged, *passed[entering:], *stopped]


def stopped_by(candidate: Candidate, settings: recipe.Selection) -> tuple[str, ...]:
    """Names of the gates that a candidate does not pass."""
    failed = {
        "max_kl": candidate.kl > settings.max_kl,
        "min_induce": candidate.induce < settings.min_induce,
    }
    return tuple(name for name, fails in failed.items() if fails)


def none_passed(candidates: Sequence[Candidate], settings: recipe.Selection) -> str:
    """The error message: which gate stopped each candidate, and what the nearest one needs."""
    kl = [f"{place_of(c)} ({c.kl:.3g})" for c in candidates if "max_kl" in c.stopped_by]
    induce = [f"{place_of(c)} ({c.induce:.3g})" for c in candidates if "min_induce" in c.stopped_by]
    reasons = []
    if kl:
        reasons.append(f"`max_kl` {settings.max_kl:g} stops layers {', '.join(kl)}")
    if induce:
        reasons.append(f"`min_induce` {settings.min_induce:g} stops layers {', '.join(induce)}")
    nearest = min(candidates, key=lambda c: (len(c.stopped_by), c.kl, -c.induce))
    # rounded to the side that lets it pass
    needs = {
        "max_kl": f"selection.max_kl={nearest.kl * 1.01:.3g}",
        "min_induce": f"selection.min_induce={nearest.induce - 0.01 * abs(nearest.induce):.3g}",
    }
    overrides = " ".join(f"--set {needs[name]}" for name in nearest.stopped_by)
    return (
        f"No layer passes the gates of `selection`: {'; '.join(reasons)}. The nearest is layer "
        f"{place_of(nearest)}, which needs {overrides}. Lower `edit.strength`, give target and "
        "contrast prompts that differ in the behaviour alone, or move the gate."
    )


def require_enough(candidates: Sequence[Candidate], k: int) -> None:
    """Raises DirectionError if fewer than k candidates passed."""
    passed = [place_of(c) for c in candidates if not c.stopped_by]
    if len(passed) < k:
        raise DirectionError(
            f"`k` is {k}, but only {len(passed)} of {len(candidates)} candidate layers pass the "
            f"gates of `selection` ({', '.join(map(str, passed))}). Give a smaller k, or `k: auto`."
        )
