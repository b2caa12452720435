"""Layers, positions and k: the recipe's, or chosen by measurement where it has `sweep` or `auto`.

The stage writes work/sweep.json and pictures; `selected_layers` is what later stages read.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from abliterator.bake import sequential_pairs
from abliterator.pipeline._judges import choosing_judge
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Artefact, Stage
from abliterator.pipeline.stages.capture import (
    cleaning,
    fitted,
    observations,
    position_of,
    shuffled,
)
from abliterator.pipeline.stages.prompts import prompt_sets
from abliterator.record import Selection

if TYPE_CHECKING:
    from torch import Tensor

    from abliterator.directions import (
        AnyPlace,
        Directions,
        Observations,
        Place,
        Position,
        Subspace,
    )
    from abliterator.engines import Engine
    from abliterator.evaluation import EvaluationContext, RenderedPrompts
    from abliterator.prompts import Prompt
    from abliterator.selection import Pool, ScoringPrompts


SWEEP = Artefact("selection", "work/sweep.json")


def selection_of(run: Run) -> Selection | None:
    """What the selection stage measured; None where the recipe names layers."""
    return SWEEP.read_as(run, Selection) if run.recipe.selects else None


class SelectedLayers(NamedTuple):
    """Layers and positions of the removed directions, and their number.

    Attributes:
        places: layer and position of each direction, in order of preference; one alone where all
            directions are of one layer, unless its nodes were chosen from.
        k: directions that are removed from what a block writes.
    """

    places: tuple[AnyPlace, ...]
    k: int

    @property
    def layers(self) -> tuple[int, ...]:
        """The residual layers; that of nodes once."""
        from abliterator.directions import nodes_of

        layers = tuple(place.layer for place in self.places)
        return layers[:1] if nodes_of(self.places) else layers

    @property
    def positions(self) -> tuple[int | str, ...]:
        """Their positions, each once, the last token's first."""
        from abliterator.directions import position_order

        return tuple(sorted({place.position for place in self.places}, key=position_order))


def selected_layers(run: Run) -> SelectedLayers:
    """The layers that the recipe names, or those that the selection stage selected."""
    return _selected(run, selection_of(run))


def _selected(run: Run, selection: Selection | None) -> SelectedLayers:
    places, k = ranked_places(run, selection), selection.k if selection else run.plan.k
    of_one_place = run.recipe.directions.of_one_layer and not run.recipe.sweeps_nodes
    n = 1 if of_one_place else len(places) if run.recipe.directions.stack == "per_layer" else k
    return SelectedLayers(tuple(places[:n]), k)


def ranked_places(run: Run, selection: Selection | None) -> list[AnyPlace]:
    """All layers and positions in order of preference: the selection's, or the recipe's."""
    from abliterator.directions import Node, Place

    if selection is not None and selection.nodes:
        return list(map(Node, selection.layers, selection.positions, selection.nodes))
    if selection is not None:
        return list(map(Place, selection.layers, selection.positions))
    return [Place(layer, position_of(run)) for layer in run.plan.layers]


def pool_of(run: Run, extracted: Mapping[Position, Directions], *, controls: bool = True) -> Pool:
    """The candidates of a selection: the plan's layers at the captured positions, or nodes of one.

    Args:
        run: the run.
        extracted: `fitted` of it.
        controls: whether directions of shuffled labels are made too.
    """
    from abliterator.directions import Node, Place
    from abliterator.selection import Pool

    observed = observations(run)
    places = [Place(layer, position) for layer in run.plan.layers for position in extracted]
    nodes = _nodes(run, places, observed) if run.recipe.directions.stack == "som" else {}
    candidates: Sequence[AnyPlace] = places
    if run.recipe.sweeps_nodes:
        candidates = [Node(*places[0], i) for i in range(len(nodes[places[0]]))]
    return Pool(
        places=candidates,
        directions=extracted,
        shuffled=shuffled(run) if controls else (),
        differences={
            position: o.vectors["differences"]
            for position, o in observed.items()
            if "differences" in o.vectors
        },
        nodes=nodes,
    )


def _nodes(
    run: Run, places: Sequence[Place], observed: Mapping[Position, Observations]
) -> dict[Place, Tensor]:
    """The directions of each place's self-organising map; where layers are named, of the first."""
    from abliterator.directions import map_directions

    removed, grid = cleaning(run), run.recipe.directions.grid
    of = places if run.recipe.sweeps else places[:1]
    return {
        p: map_directions(observed[p.position], p.layer, grid=grid, cleaning=removed) for p in of
    }


def extracted_subspace(
    run: Run, extracted: Mapping[Position, Directions] | None = None
) -> Subspace:
    """The subspace of the selected layers, as extracted from activations.

    Args:
        run: the run.
        extracted: `fitted` of it, which not every estimator makes in no time.
    """
    from abliterator.directions import per_layer

    selected, directions = selected_layers(run), extracted or fitted(run)
    if run.recipe.directions.stack == "per_layer":
        return per_layer(directions[selected.places[0].position], selected.layers)
    together = pool_of(run, directions, controls=False).stack(selected.places, selected.k)
    if run.recipe.directions.stack == "sequential":
        return one_by_one(run, vectors_at(directions, selected.places), together.layers)
    return together


def vectors_at(directions: Mapping[Position, Directions], places: Sequence[AnyPlace]) -> Tensor:
    """The directions [k, H] of places, in their order."""
    import torch

    return torch.stack([directions[p.position].vectors[p.layer - 1] for p in places])


def one_by_one(run: Run, directions: Tensor, layers: tuple[int, ...]) -> Subspace:
    """Directions [k, H] removed one after the other, as pairs (U, V) of every writer.

    These are rounded to float32, in which the checkpoint's file of directions has them.
    """
    from abliterator.directions import Subspace

    pairs, _ = sequential_pairs(run.plan.edits, run.plan.checkpoint, directions)
    return Subspace(pairs.float().double(), layers)


def _key(run: Run) -> Any:
    recipe = run.recipe
    sections = ("chat", "capture", "directions", "selection", "edit")
    return [
        run.base_digest(),
        run.digest("capture"),
        {name: run.section(name) for name in sections},
        {name: s.sha256 for name, s in prompt_sets(run).selection.items()},
        [recipe.layers, recipe.k, recipe.seed],
        choosing_judge(run).identity.model_dump(mode="json"),
        run.dtype,
        *run.answers_depend_on(candidates=True),
    ]


def _run(run: Run) -> list[Path]:
    from abliterator.selection import choose

    recipe, settings = run.recipe, run.recipe.selection
    context, scoring = selection_context(run)
    cost = run.plan.selection or {}
    # answers at most: it ends where a stack is no better
    with run.progress.bar("selection, answers", cost.get("answers", 0)) as advance:
        selection = choose(
            context,
            scoring,
            pool_of(run, fitted(run)),
            sweep=recipe.sweeps or recipe.sweeps_nodes,
            k=settings.stacks if recipe.k == "auto" else recipe.k,
            settings=settings,
            on_step=lambda step: advance(step.answers, status=step.name),
        )
    selected = _selected(run, selection)
    places = ", ".join(map(str, selected.places))
    run.progress.note(
        f"Chosen: layers {places} (k = {selection.k}: {selection.why}). "
        f"{selection.structure.verdict}: {selection.structure.because}."
    )
    return [SWEEP.write(run, selection), *_pictures(run, selection, selected)]


def selection_context(run: Run) -> tuple[EvaluationContext, ScoringPrompts]:
    """The base with the prompts on which candidates are judged, and those by which they are scored.

    Held-out prompts are judged; directions may have been taken from the others.
    """
    from abliterator.selection import KL_TOKENS, ScoringPrompts

    settings = run.recipe.selection
    context = held_out_context(
        run,
        kl_tokens=KL_TOKENS,
        batch_size=settings.rows,
        engine=run.answering(run.plan.source.folder, candidates=True),
    )
    scoring = (
        rendered(run, sampled(run, name, settings.scored), name=name)
        for name in ("target", "contrast")
    )
    return context, ScoringPrompts(*scoring)


def held_out_context(
    run: Run, *, kl_tokens: int, batch_size: int | None, engine: Engine | None = None
) -> EvaluationContext:
    """The base with the prompts of `selection`, on which choices are judged.

    Args:
        run: the run.
        kl_tokens: answer tokens compared of each neutral prompt, at most.
        batch_size: prompts answered together; None for the engine's choice.
        engine: of the base; left out, that of this process.
    """
    from abliterator.evaluation import EvaluationContext

    recipe, sets = run.recipe, prompt_sets(run).selection
    return EvaluationContext(
        engine=engine or run.engine(run.plan.source.folder),
        plan=run.plan.edits,
        target=rendered(run, sets["target"].prompts, name="selection target"),
        neutral=rendered(run, sets["neutral"].prompts, name="selection neutral"),
        judge=choosing_judge(run),
        max_new_tokens=recipe.selection.tokens,
        kl_tokens=kl_tokens,
        batch_size=batch_size,
        max_batch_tokens=recipe.capture.max_batch_tokens,
        seed=recipe.seed,
    )


def rendered(run: Run, prompts: Sequence[Prompt], *, name: str) -> RenderedPrompts:
    """Prompts of a choice, with room for an answer of `selection.tokens`."""
    engine, tokens = run.engine(run.plan.source.folder), run.recipe.selection.tokens
    return run.render(engine, prompts, name=name, max_new_tokens=tokens)


def sampled(run: Run, name: str, n: int) -> list[Prompt]:
    """At most `n` prompts of an extraction set, drawn by the recipe's seed; none if it has none."""
    sets = prompt_sets(run).extraction
    prompts = sets[name].prompts if name in sets else ()
    return random.Random(run.recipe.seed).sample(prompts, min(n, len(prompts)))


def _pictures(run: Run, selection: Selection, selected: SelectedLayers) -> list[Path]:
    from abliterator.directions import position_order
    from abliterator.plots import can_draw, draw_cosines, draw_curves

    if not can_draw():
        run.progress.note("No pictures: `pip install 'abliterator[plots]'` draws the sweep.")
        return []
    folder = run.workspace.work / "plots"
    structure = selection.structure
    paths = [folder / "cosines.png"]
    draw_cosines(paths[0], structure.cosines, structure.layers)
    if selection.candidates and not selection.nodes:
        paths.append(folder / "sweep.png")
        ordered = sorted(selection.candidates, key=lambda c: (position_order(c.position), c.layer))
        answers = [c.answers for c in ordered]
        curves: dict[str, list[float | None]] = {
            "bypass, log-odds": [c.bypass for c in ordered],
            "KL, nats": [c.kl for c in ordered],
            "induce, log-odds": [c.induce for c in ordered],
            "compliance": [a.compliance.value if a and a.compliance else None for a in answers],
            "coherence": [a.coherence.value if a and a.coherence else None for a in answers],
        }
        places = [(c.layer, c.position) for c in ordered]
        draw_curves(paths[1], places, curves, chosen=selected.layers)
    return paths


SELECTION = Stage("selection", 6, _key, _run, asks_model=True)
