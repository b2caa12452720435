"""The subspace that is removed: extracted at the selected layers, or tuned from that.

The stage writes it to work/directions.safetensors, beside the directions of all layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterator.bake import sequential_pairs
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Artefact, Stage
from abliterator.pipeline.stages.capture import cleaning, fitted, observations
from abliterator.pipeline.stages.selection import extracted_subspace, selected_layers, vectors_at
from abliterator.pipeline.stages.tuning import tuned_inputs, tuned_subspace
from abliterator.record import DirectionChecks, ProtectedSet

if TYPE_CHECKING:
    from torch import Tensor

    from abliterator.directions import Directions, Position, Subspace
    from abliterator.recipe import Recipe

SUBSPACE = Artefact("directions", "work/directions.safetensors")
CHECKS = Artefact("directions", "work/direction_checks.json")
_DIGITS = 6  # of the figures
_REFUSAL_AND_HARMFULNESS = {-1, "instruction"}  # positions


def removed_subspace(run: Run) -> Subspace:
    """The subspace that is removed from the weights."""
    from abliterator.directions import load_subspace

    return load_subspace(SUBSPACE.checked(run))


def _key(run: Run) -> Any:
    settings = run.section("directions")
    return [run.digest("capture"), settings, selected_layers(run), tuned_inputs(run)]


def _run(run: Run) -> list[Path]:
    from abliterator.directions import save_directions

    selected, directions = selected_layers(run), fitted(run)
    subspace = tuned_subspace(run, selected.layers) or extracted_subspace(run, directions)
    position = selected.places[0].position
    save_directions(SUBSPACE.path(run), directions[position], subspace)
    checks = _checks(run, directions, position)
    return [SUBSPACE.path(run), *([CHECKS.write(run, checks)] if checks else [])]


def direction_checks(run: Run) -> DirectionChecks | None:
    """Figures of the directions; None where the recipe has nothing to check.

    None too where an earlier version made the directions, which had no such figures.
    """
    if not _has_checks(run.recipe) or not CHECKS.path(run).is_file():
        return None
    return CHECKS.read_as(run, DirectionChecks)


def _has_checks(recipe: Recipe) -> bool:
    return (
        bool(recipe.prompts.protect)
        or {*recipe.directions.positions} >= _REFUSAL_AND_HARMFULNESS
        or recipe.directions.stack == "sequential"
    )


def _checks(
    run: Run, directions: Mapping[Position, Directions], position: Position
) -> DirectionChecks | None:
    from abliterator.directions import cosines_between, leave_one_set_out

    if not _has_checks(run.recipe):
        return None
    shares, observed = {}, observations(run)[position]
    if observed.protected:
        name = run.recipe.directions.extracted
        shares = leave_one_set_out(name, observed, cleaning(run))
    cosines: tuple[float, ...] = ()
    if directions.keys() >= _REFUSAL_AND_HARMFULNESS:
        cosines = _rounded(cosines_between(directions["instruction"], directions[-1]))
    left: tuple[float, ...] = ()
    if run.recipe.directions.stack == "sequential":
        vectors = vectors_at(directions, selected_layers(run).places)
        left = _rounded(sequential_pairs(run.plan.edits, run.plan.checkpoint, vectors)[1])
    return DirectionChecks(
        left_behind=left,
        protected=tuple(
            ProtectedSet(
                name=name,
                prompts=observed.protected[name].n,
                before=_rounded(share.before),
                protected=_rounded(share.protected),
                left_out=_rounded(share.left_out),
            )
            for name, share in shares.items()
        ),
        harmfulness_cosine=cosines,
    )


def _rounded(values: Tensor) -> tuple[float, ...]:
    return tuple(round(value, _DIGITS) for value in values.tolist())


DIRECTIONS = Stage("directions", 2, _key, _run)
