"""The study `controls`: the edit beside directions that owe nothing to the behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from abliterator.pipeline._run import Run
from abliterator.pipeline._study._evaluator import described, evaluator_of
from abliterator.pipeline._study._settings import Measured, StudySettings
from abliterator.pipeline._study._vectors import LayerObservations, observed, protected_prompts
from abliterator.pipeline.stages.capture import cleaning, observations
from abliterator.pipeline.stages.prompts import prompt_sets
from abliterator.pipeline.stages.selection import (
    extracted_subspace,
    one_by_one,
    selected_layers,
    vectors_at,
)
from abliterator.pipeline.stages.tuning import planned_edits, tuned_subspace

if TYPE_CHECKING:
    from torch import Tensor

    from abliterator.directions import Position


def controls(run: Run, settings: StudySettings) -> Measured:
    from abliterator.study import TOGETHER, TOLERANCE, random_like, study_controls

    selected, selection = selected_layers(run), run.recipe.selection
    basis = (tuned_subspace(run, selected.layers) or extracted_subspace(run)).basis
    draws, null_draws = selection.controls, settings.draws
    shuffled = shuffled_bases(run, draws + null_draws)
    nulls = {
        "shuffled labels": shuffled[draws:],  # other draws than those of the rows
        "random directions": [random_like(basis, draws + i) for i in range(null_draws)],
    }
    nulls = {of: bases for of, bases in nulls.items() if bases}
    # a matched control takes about three steps, a null distribution one for some of its draws
    steps = 1 + 5 * draws + len(nulls) * (1 + null_draws // TOGETHER)
    sets = prompt_sets(run)
    with evaluator_of(run, settings, sets, edits=steps, plan=planned_edits(run)) as evaluator:
        study = study_controls(
            evaluator,
            basis,
            shuffled[:draws],
            draws=draws,
            matched=draws,
            nulls=nulls,
            null_prompts=selection.scored,
            null_tokens=selection.tokens,
        )
    about = {
        "layers": selected.layers,
        "k": basis.shape[-1],
        "matched KL": f"within {TOLERANCE:.0%} of the edit's, by one factor on all strengths",
    }
    return study, {**about, **described(evaluator)}


def shuffled_bases(run: Run, draws: int) -> list[Tensor]:
    """Q of the selected places from shuffled labels, which hold nothing of the kinds' difference.

    Halves with as many prompts of each kind; within a layer, pairs of which half are swapped. Were
    every labelling as likely, many would have enough of the difference by chance to remove it, for
    a direction is removed whatever its length. None where directions are tuned, or nodes of a map
    were chosen by measurement, since these would not be.

    Args:
        run: the run.
        draws: how many.
    """
    settings, seed = run.recipe.directions, run.recipe.seed
    if settings.estimator == "tuned" or run.recipe.sweeps_nodes:
        return []
    if settings.stack == "within_layer":
        return _swapped(run, draws)
    places, extraction = selected_layers(run).places, prompt_sets(run).extraction
    needed = ("target", "contrast", *(["neutral"] if run.recipe.needs_neutral_mean else []))
    at = observed(
        run,
        {name: extraction[name].prompts for name in needed if name in extraction},
        sorted({place.layer for place in places}),
        tuple(dict.fromkeys(place.position for place in places)),
        protected=protected_prompts(extraction),
    )
    halves = (f"{seed} {{name}} {draw}" for draw in range(draws))
    return [_basis(run, {p: of.balanced(half) for p, of in at.items()}) for half in halves]


def _basis(run: Run, at: Mapping[Position, LayerObservations]) -> Tensor:
    """Q, or U and V, of the selected places by the recipe's estimator and stack, other labels."""
    from abliterator.directions import Place, Sources, per_layer, stack_at, subspace_of

    settings, selected, cleans = run.recipe.directions, selected_layers(run), cleaning(run)
    directions = {p: of.directions(settings.extracted, cleans) for p, of in at.items()}
    first = selected.places[0]
    if settings.stack == "per_layer":
        return per_layer(directions[first.position], selected.layers).basis
    if settings.stack == "som":
        of = at[first.position]
        sources = Sources(of.observations, directions[first.position], cleans, settings.grid)
        row = of.layers.index(first.layer) + 1
        return subspace_of("som", sources, layers=(row,), k=selected.k).basis
    # chosen nodes have no other labels, so these are places
    together = stack_at(directions, [Place(p.layer, p.position) for p in selected.places])
    if settings.stack == "sequential":
        vectors = vectors_at(directions, selected.places)
        return one_by_one(run, vectors, together.layers).basis
    return together.basis


def _swapped(run: Run, draws: int) -> list[Tensor]:
    """Q within the selected layer, the sides of half of the pairs swapped."""
    import torch

    from abliterator.directions import within_layer
    from abliterator.subspace import orthonormal_basis

    selected = selected_layers(run)
    first = selected.places[0]
    pairs = observations(run)[first.position].at_layer("differences", first.layer)
    bases = []
    for draw in range(draws):
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(draw))
        swapped = torch.where(order[:, None] % 2 == 0, pairs, -pairs)
        vectors = within_layer(swapped.mean(dim=0), swapped)
        bases.append(orthonormal_basis(vectors[: selected.k]))
    return bases
