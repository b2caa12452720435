"""Strengths and directions by gradients, for recipes that ask for it.

The stage leaves every tuned edit in work/tuning.json and work/tuning.safetensors; which of them is
baked, the recipe's preferences decide as they are read (`planned_edits`, `tuned_subspace`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterator.bake import EditPlan
from abliterator.files import write_bytes_atomic
from abliterator.pipeline._judges import choosing_judge
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Artefact, Stage
from abliterator.pipeline.stages.prompts import prompt_sets
from abliterator.pipeline.stages.selection import extracted_subspace, selected_layers

if TYPE_CHECKING:
    from abliterator.directions import Subspace
    from abliterator.recipe import Recipe
    from abliterator.tuning import Asked, Settings, Subject


TUNED = Artefact("tuning", "work/tuning.json")  # trials, and the strengths of each
BASES = Artefact("tuning", "work/tuning.safetensors")  # `bases` [trials, H, k] in the same order


def _key(run: Run) -> Any:
    recipe, sets = run.recipe, prompt_sets(run)
    sections = ("chat", "directions", "edit")
    return [
        run.base_digest(),
        run.digest("capture"),
        selected_layers(run),
        {name: run.section(name) for name in sections},
        {name: s.sha256 for name, s in {**sets.extraction, **sets.selection}.items()},
        # which point is preferred is not asked here: another one needs no other descent
        run.section("tuning", exclude=("prefer", "at_most")),
        [recipe.seed, recipe.selection.tokens, recipe.rollouts.batch_size],
        choosing_judge(run).identity.model_dump(mode="json"),
        run.dtype,
    ]


def _run(run: Run) -> list[Path]:
    import torch
    from safetensors.torch import save

    from abliterator.tuning import tune

    cost = run.plan.tuning or {}
    lessons = len(run.recipe.tuning.kl_weights)  # one round before each leg
    with run.progress.bar("tuning", lessons + cost["steps"] + cost["points"]) as advance:
        found = tune(
            _subject(run),
            extracted_subspace(run).basis,
            settings_of(run.recipe),
            on_step=lambda what: advance(1, status=what),
        )
    bases = torch.stack([setting.basis for setting in found.settings])
    write_bytes_atomic(BASES.path(run), save({"bases": bases}))
    tuned = {
        "lessons": found.lessons,
        "points": [point.model_dump(mode="json") for point in found.points],
        "strengths": [dict(setting.strengths) for setting in found.settings],
    }
    return [TUNED.write(run, tuned), BASES.path(run)]


def settings_of(recipe: Recipe) -> Settings:
    """The recipe's section as the plain arguments that the descent takes."""
    from abliterator.tuning import Settings

    tuning = recipe.tuning
    return Settings(
        strengths=recipe.edit.strength == "auto",
        directions=recipe.directions.estimator == "tuned",
        steps=tuning.steps,
        batch=tuning.batch,
        tokens=tuning.tokens,
        kl_weights=tuning.kl_weights,
        scales=tuning.scales,
        seed=recipe.seed,
    )


def _subject(run: Run) -> Subject:
    from abliterator.tuning import Asked, Subject

    loaded, sets = run.loaded(run.plan.source.folder), prompt_sets(run)

    def asked(prompts: Sequence[str], name: str) -> Asked:
        length = run.recipe.selection.tokens
        return Asked(prompts, run.render(loaded, prompts, name=name, max_new_tokens=length))

    def learned(name: str) -> list[str]:
        prompts = sets.extraction[name].prompts if name in sets.extraction else ()
        few = min(run.recipe.tuning.prompts, len(prompts))
        return random.Random(run.recipe.seed).sample(prompts, few)

    return Subject(
        loaded=loaded,
        plan=run.plan.edits,
        target=asked(learned("target"), "target"),
        # the contrast must stay as it was too: it is as like target as can be
        neutral=asked(learned("neutral") + learned("contrast"), "neutral and contrast"),
        held_out=asked(sets.selection["target"].prompts, "selection target"),
        held_out_neutral=asked(sets.selection["neutral"].prompts, "selection neutral"),
        judge=choosing_judge(run),
        max_new_tokens=run.recipe.selection.tokens,
        batch_size=run.batch_size,
    )


def tuning_of(run: Run) -> dict[str, Any] | None:
    """What the tuning stage found and which point the recipe prefers; None where nothing is tuned.

    Raises:
        DirectionError: if no point keeps the recipe's limit.
    """
    from abliterator.tuning import Point, prefer

    if not run.recipe.tunes:
        return None
    found: dict[str, Any] = TUNED.read(run)
    wanted, max_kl = run.recipe.tuning, run.recipe.selection.max_kl
    points = [Point.model_validate(point) for point in found["points"]]
    found["taken"] = prefer(points, wanted.prefer, wanted.at_most, max_kl=max_kl)
    return found


def tuning_record(run: Run) -> dict[str, Any] | None:
    """The same for the record, without the strengths, which are in edits.json."""
    found = tuning_of(run)
    return found and {name: value for name, value in found.items() if name != "strengths"}


def tuned_subspace(run: Run, layers: tuple[int, ...]) -> Subspace | None:
    """The subspace of the point that is taken; None where nothing is tuned."""
    from safetensors.torch import load_file

    from abliterator.directions import Subspace

    found = tuning_of(run)
    if found is None:
        return None
    bases = load_file(BASES.checked(run))["bases"]
    return Subspace(bases[found["taken"]], layers)


def planned_edits(run: Run) -> EditPlan:
    """Which tensors are edited and how strongly: the plan's, at tuned strengths where asked for."""
    found = tuning_of(run)
    if found is None:
        return run.plan.edits
    return run.plan.edits.with_strengths(found["strengths"][found["taken"]])


def tuned_inputs(run: Run) -> Any:
    """What an artefact that depends on the point that is taken depends on."""
    found = tuning_of(run)
    return found and [run.digest("tuning"), found["taken"]]


TUNING = Stage("tuning", 4, _key, _run, asks_model=True)
