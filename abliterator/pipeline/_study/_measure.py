"""The studies of a recipe's choices: extraction, contrast, strength, number of directions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from abliterator.pipeline._run import Run
from abliterator.pipeline._study._evaluator import (
    described,
    evaluator_of,
    fitted_directions,
    template_position,
)
from abliterator.pipeline._study._settings import Measured, StudySettings
from abliterator.pipeline.stages.capture import fitted
from abliterator.pipeline.stages.prompts import load_sets, prompt_sets
from abliterator.pipeline.stages.selection import (
    extracted_subspace,
    ranked_places,
    selected_layers,
    selection_of,
)

if TYPE_CHECKING:
    from abliterator.prompts import PromptSet
    from abliterator.study import Contrast


def extraction(run: Run, settings: StudySettings) -> Measured:
    from abliterator.study import study_extraction

    sets = prompt_sets(run).extraction
    engine = run.engine(run.plan.source.folder)
    prompts = {name: sets[name].prompts[: settings.limit] for name in ("target", "contrast")}
    with run.progress.bar("captured parts", 32) as advance:
        study = study_extraction(
            engine,
            *(run.render(engine, texts, name=name).token_ids for name, texts in prompts.items()),
            position=template_position(run),
            max_batch_tokens=run.recipe.capture.max_batch_tokens,
            on_step=lambda step: advance(1, status=step),
        )
    counts = {f"{name} prompts": len(texts) for name, texts in prompts.items()}
    return study, {"position": template_position(run), **counts}


def pairs(run: Run, settings: StudySettings) -> Measured:
    from abliterator.study import study_pairs

    # generic prompts are not measured on, whether or not a build extracts from any
    sets = load_sets(run.recipe.prompts, seed=run.recipe.seed, neutral_too=True)
    contrasts: dict[Contrast, PromptSet] = {
        "paired": sets.extraction["contrast"],
        "generic": sets.extraction["neutral"],
    }
    n = min(len(s.prompts) for s in (sets.extraction["target"], *contrasts.values()))
    target = sets.extraction["target"].prompts[:n]
    engine = run.engine(run.plan.source.folder)
    directions = {
        name: fitted_directions(run, engine, target, contrast.prompts[:n])
        for name, contrast in contrasts.items()
    }
    layers = settings.layers or tuple(range(1, run.plan.anatomy.n_layers + 1))
    with evaluator_of(run, settings, sets, edits=2 * len(layers)) as evaluator:
        study = study_pairs(evaluator, directions, layers)
    counts = {"position": template_position(run), "prompts of each kind for directions": n}
    return study, {**counts, **described(evaluator)}


def alpha(run: Run, settings: StudySettings) -> Measured:
    from abliterator.study import study_alpha

    selected, sets = selected_layers(run), prompt_sets(run)
    with evaluator_of(run, settings, sets, edits=len(settings.alphas)) as evaluator:
        study = study_alpha(evaluator, extracted_subspace(run).basis, settings.alphas)
    return study, {"layers": selected.layers, "k": selected.k, **described(evaluator)}


def confirmation(run: Run, settings: StudySettings) -> Measured:
    from abliterator.directions import Place
    from abliterator.study import confirmation_edits, study_confirmation

    sets = prompt_sets(run)
    # a recipe that chooses nodes of a map has no such study
    places = [Place(p.layer, p.position) for p in ranked_places(run, selection_of(run))]
    with evaluator_of(run, settings, sets, edits=confirmation_edits(len(places))) as evaluator:
        study = study_confirmation(evaluator, fitted(run), places)
    return study, described(evaluator)
