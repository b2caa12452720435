"""The stage that chooses layers and k, for recipes that leave it to measurement."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterator.files import write_text_atomic
from abliterator.pipeline._chosen import Chosen, chosen_of, sweep_path
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Parts, Stage
from abliterator.pipeline.stages.bake import pool_of
from abliterator.pipeline.stages.judge import choosing_judge
from abliterator.pipeline.stages.prompts import prompt_sets

if TYPE_CHECKING:
    from abliterator.model import LoadedModel
    from abliterator.prompts import PromptSet
    from abliterator.selection import Asked, Selection, Subject


def _selection_inputs(run: Run) -> Any:
    recipe = run.recipe
    sections = ("chat", "capture", "directions", "selection", "edit")
    return [
        run.base_digest(),
        run.digest("capture"),
        {name: getattr(recipe, name).model_dump(mode="json") for name in sections},
        {name: s.sha256 for name, s in prompt_sets(run).selection.items()},
        [recipe.layers, recipe.k, recipe.seed],
        choosing_judge(run).identity.model_dump(mode="json"),
        run.dtype,
    ]


def _select(run: Run) -> tuple[list[Path], Parts]:
    from abliterator.selection import Gates, Search, choose

    recipe, asked = run.recipe, run.recipe.selection
    subject = subject_of(run, run.loaded(run.plan.source.folder))
    with run.progress.bar("selection", steps(run)) as advance:
        found = choose(
            subject,
            pool_of(run),
            sweep=recipe.sweeps,
            k=asked.stacks if recipe.k == "auto" else recipe.k,
            search=Search(
                gates=Gates(asked.max_kl, asked.min_induce),
                survivors=asked.survivors,
                schedule=asked.schedule,
                controls=asked.controls,
                seed=recipe.seed,
            ),
            on_step=lambda what: advance(1, status=what),
        )
    write_text_atomic(sweep_path(run), found.model_dump_json(indent=1) + "\n")
    taken = chosen_of(run, found.model_dump(mode="json"))
    places = ", ".join(map(str, taken.places))
    run.progress.note(
        f"Chosen: layers {places} (k = {found.k}: {found.why}). {found.structure.verdict}: "
        f"{found.structure.because}."
    )
    return [sweep_path(run), *_pictures(run, found, taken)], {}


def steps(run: Run) -> int:
    """Steps of a selection, about: it ends early where a stack is no better."""
    cost = run.plan.selection or {}
    swept = 1 + len(run.recipe.selection.rungs) + 1 if run.recipe.sweeps else 0
    return 1 + swept + cost.get("stacks", 0)


def subject_of(run: Run, loaded: LoadedModel) -> Subject:
    """The loaded model with the prompts on which candidates are tried."""
    from abliterator.model import block_paths
    from abliterator.selection import Asked, Subject

    recipe, sets = run.recipe, prompt_sets(run)

    def asked(prompts: Sequence[str], name: str) -> Asked:
        length = recipe.selection.tokens
        return Asked(prompts, run.render(loaded, prompts, name=name, max_new_tokens=length))

    def sampled(prompts: PromptSet) -> Asked:
        few = min(recipe.selection.scored, len(prompts.prompts))
        return asked(random.Random(recipe.seed).sample(prompts.prompts, few), prompts.name)

    return Subject(
        loaded=loaded,
        plan=run.plan.edits,
        blocks=block_paths(run.plan.anatomy.blocks, run.plan.anatomy.n_layers),
        target=sampled(sets.extraction["target"]),
        contrast=sampled(sets.extraction["contrast"]),
        neutral=asked(sets.selection["neutral"].prompts, "selection neutral"),
        held_out=asked(sets.selection["target"].prompts, "selection target"),
        judge=choosing_judge(run),
        max_new_tokens=recipe.selection.tokens,
        batch_size=recipe.selection.batch_size,
        max_batch_tokens=recipe.capture.max_batch_tokens,
    )


def _pictures(run: Run, found: Selection, taken: Chosen) -> list[Path]:
    from abliterator.plots import can_draw, draw_cosines, draw_curves

    if not can_draw():
        run.progress.note("No pictures: `pip install 'abliterator[plots]'` draws the sweep.")
        return []
    folder = run.workspace.work / "plots"
    structure = found.structure
    paths = [folder / "cosines.png"]
    draw_cosines(paths[0], structure.cosines, structure.layers)
    if found.candidates:
        paths.append(folder / "sweep.png")
        ordered = sorted(found.candidates, key=lambda c: (-c.position, c.layer))
        answers = [c.answers for c in ordered]
        curves: dict[str, list[float | None]] = {
            "bypass, log-odds": [c.bypass for c in ordered],
            "KL, nats": [c.kl for c in ordered],
            "induce, log-odds": [c.induce for c in ordered],
            "compliance": [a.compliance.value if a and a.compliance else None for a in answers],
            "coherence": [a.coherence.value if a and a.coherence else None for a in answers],
        }
        places = [(c.layer, c.position) for c in ordered]
        draw_curves(paths[1], places, curves, chosen=taken.layers)
    return paths


SELECTION = Stage("selection", 5, _selection_inputs, _select)
