"""The study `estimators`: every estimate and stack of the directions, from the same vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from abliterator.errors import DirectionError, PromptError, UnsupportedModel
from abliterator.pipeline._run import Run
from abliterator.pipeline._study._evaluator import described, evaluator_of
from abliterator.pipeline._study._settings import Measured, StudySettings
from abliterator.pipeline._study._vectors import (
    KINDS,
    PROTECTED,
    LayerObservations,
    observed,
    protected_prompts,
)
from abliterator.pipeline.stages.capture import position_of
from abliterator.pipeline.stages.prompts import PromptSets, prompt_sets, with_pairs
from abliterator.pipeline.stages.selection import one_by_one, selected_layers
from abliterator.pipeline.stages.tuning import planned_edits, tuned_subspace

if TYPE_CHECKING:
    from torch import Tensor

    from abliterator.directions import Directions, Position, Subspace

T = TypeVar("T")

REFERENCE = "mean_difference"
STACKED = 3  # directions of one layer, where a stack has several
INSTRUCTION = "instruction"


@dataclass(frozen=True)
class _Estimates:
    """Estimates at every layer, by name, and what they were made from.

    Attributes:
        of: observations at the recipe's position.
        by_name: the first is `REFERENCE`.
        layers: of the study, in order of preference.
        k: directions that are stacked.
    """

    of: LayerObservations
    by_name: dict[str, Directions]
    layers: tuple[int, ...]
    k: int


def estimators(run: Run, settings: StudySettings) -> Measured:
    """Measures every estimator, and every stack of the mean difference, at the recipe's layers."""
    from abliterator.directions import cosines_between
    from abliterator.study import EstimatedEdit, study_estimators

    selected, sets = selected_layers(run), prompt_sets(run)
    layers = settings.layers or selected.layers
    at = _observations(run, sets)
    of = at[position_of(run)]
    estimates = _Estimates(of, _by_name(run, at), layers, min(selected.k, len(layers)))
    subspaces = _made(run, _subspaces(run, sets, estimates))
    edits = [EstimatedEdit(name, made.basis, made.layers) for name, made in subspaces]
    if (tuned := tuned_subspace(run, layers)) is not None:
        name = f"tuned, {run.recipe.directions.stack}"
        edits.append(EstimatedEdit(name, tuned.basis, tuned.layers, planned_edits(run)))
    reference = estimates.by_name[REFERENCE]
    others = {name: d for name, d in estimates.by_name.items() if name != REFERENCE}
    draws = run.recipe.selection.controls
    # a matched control takes about three steps
    steps = len(edits) * len(settings.scales) + 5 * draws
    with evaluator_of(run, settings, sets, edits=steps) as evaluator:
        study = study_estimators(
            evaluator,
            edits,
            scales=settings.scales,
            draws=draws,
            cosines={name: cosines_between(reference, d) for name, d in others.items()},
        )
    counts = {"target prompts for directions": of.observations.target.n}
    counts["contrast prompts for directions"] = of.observations.contrast.n
    protected = {f"protected, {n}": m.n for n, m in of.observations.protected.items()}
    return study, {
        "layers": layers,
        "k": estimates.k,
        **counts,
        **protected,
        **described(evaluator),
    }


def _observations(run: Run, sets: PromptSets) -> dict[Position, LayerObservations]:
    """Observations at every layer, at the recipe's position and at the end of the user's text."""
    extraction, position = sets.extraction, position_of(run)

    def at(*positions: Position) -> dict[Position, LayerObservations]:
        return observed(
            run,
            {name: of.prompts for name, of in extraction.items() if not name.startswith(PROTECTED)},
            range(1, run.plan.anatomy.n_layers + 1),
            positions,
            protected=protected_prompts(extraction),
        )

    if position == INSTRUCTION:
        return at(position)
    try:
        return at(position, INSTRUCTION)
    except (DirectionError, UnsupportedModel) as error:
        run.progress.note(f"No direction at the end of the user's text: {error}")
        return at(position)


def _by_name(run: Run, at: dict[Position, LayerObservations]) -> dict[str, Directions]:
    """Every estimate: as it is, projected, protected, and at the end of the user's text."""
    from abliterator.directions import ESTIMATORS, Cleaning

    whole = at[position_of(run)]
    of, plain = whole.unprotected(), Cleaning()
    makers: dict[str, Callable[[], Directions]] = {
        name: partial(of.directions, name, plain) for name in (REFERENCE, *ESTIMATORS)
    }
    if whole.observations.neutral or run.recipe.prompts.contrast is None:
        projected = Cleaning(projection=True)
        makers[f"{REFERENCE}, projected"] = partial(of.directions, REFERENCE, projected)
    if whole.observations.protected:
        cleaning = Cleaning(ridge=run.recipe.directions.ridge)
        makers[f"{REFERENCE}, protected"] = partial(whole.directions, REFERENCE, cleaning)
    if INSTRUCTION in at and position_of(run) != INSTRUCTION:
        there = at[INSTRUCTION].unprotected()
        makers[f"{REFERENCE} at instruction"] = partial(there.directions, REFERENCE, plain)
    return dict(_made(run, makers))


def _made(run: Run, makers: Mapping[str, Callable[[], T]]) -> Iterator[tuple[str, T]]:
    """What can be made, by name; the rest is noted."""
    for name, make in makers.items():
        try:
            yield name, make()
        except (DirectionError, PromptError) as error:
            if name == REFERENCE:
                raise
            run.progress.note(f"Left out, {name}: {error}")


def _subspaces(
    run: Run, sets: PromptSets, estimates: _Estimates
) -> dict[str, Callable[[], Subspace]]:
    """What makes the subspace of each estimate, then of each other stack, by name."""
    from abliterator.directions import STACKS, per_layer, stack

    layers, k = estimates.layers, estimates.k
    makers: dict[str, Callable[[], Subspace]] = {
        name: partial(stack, directions, layers[:k])
        for name, directions in estimates.by_name.items()
    }
    if all(edit.writer.layer >= 0 for edit in run.plan.edits.edits):  # embeddings have no block
        of_blocks = run.recipe.selection.candidates(run.plan.anatomy.n_layers)
        reference = estimates.by_name[REFERENCE]
        makers[f"{REFERENCE}, per_layer"] = partial(per_layer, reference, of_blocks)
    for name, method in STACKS.items():
        paired = "differences" in method.needs_vectors
        if method.within and not (paired and run.recipe.prompts.contrast is None):
            makers[f"{name}, {STACKED} directions"] = partial(_within, name, run, sets, estimates)
    # as published, which removes less than the span where directions are alike
    makers[f"som, {STACKED} directions one by one"] = lambda: one_by_one(
        run, _nodes(run, estimates), layers[:1]
    )
    if k > 1:
        vectors = estimates.by_name[REFERENCE].vectors[[layer - 1 for layer in layers[:k]]]
        makers[f"{REFERENCE} one by one"] = partial(one_by_one, run, vectors, layers[:k])
    return makers


def _within(name: str, run: Run, sets: PromptSets, estimates: _Estimates) -> Subspace:
    """A stack of several directions of the first layer."""
    import torch

    from abliterator.directions import STACKS, Sources, subspace_of

    observations = estimates.of.unprotected().observations
    if "differences" in STACKS[name].needs_vectors:
        pairs = with_pairs(sets, run.recipe.prompts).pairs
        target, contrast = (observations.vectors[kind] for kind in KINDS)
        if (len(target), len(contrast)) != tuple(len(sets.extraction[k].prompts) for k in KINDS):
            raise DirectionError("not every prompt has this position, so pairs are not known.")
        differences = torch.stack([target[t] - contrast[c] for t, c in pairs])
        vectors = {**observations.vectors, "differences": differences}
        observations = replace(observations, vectors=vectors)
    grid = run.recipe.directions.grid
    sources = Sources(observations, estimates.by_name[REFERENCE], grid=grid)
    return subspace_of(name, sources, layers=estimates.layers, k=STACKED)


def _nodes(run: Run, estimates: _Estimates) -> Tensor:
    """The directions [n, H] of the map of the first layer that are stacked."""
    from abliterator.directions import map_directions

    observations, grid = estimates.of.unprotected().observations, run.recipe.directions.grid
    return map_directions(observations, estimates.layers[0], grid=grid)[:STACKED]
