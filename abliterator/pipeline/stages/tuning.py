"""The stage that tunes strengths and directions, for recipes that ask for it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterator.files import write_bytes_atomic, write_text_atomic
from abliterator.pipeline._chosen import chosen
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Parts, Stage
from abliterator.pipeline._tuned import tuned_bases_path, tuning_path
from abliterator.pipeline.stages.bake import extracted
from abliterator.pipeline.stages.judge import choosing_judge
from abliterator.pipeline.stages.prompts import prompt_sets

if TYPE_CHECKING:
    from abliterator.recipe import Recipe
    from abliterator.tuning import Asked, Settings, Subject


def _tuning_inputs(run: Run) -> Any:
    recipe, sets = run.recipe, prompt_sets(run)
    sections = ("chat", "directions", "edit")
    return [
        run.base_digest(),
        run.digest("capture"),
        chosen(run),
        {name: getattr(recipe, name).model_dump(mode="json") for name in sections},
        {name: s.sha256 for name, s in {**sets.extraction, **sets.selection}.items()},
        # which point is preferred is not asked here: another one needs no other descent
        recipe.tuning.model_dump(mode="json", exclude={"prefer", "at_most"}),
        [recipe.seed, recipe.selection.tokens, recipe.rollouts.batch_size],
        choosing_judge(run).identity.model_dump(mode="json"),
        run.dtype,
    ]


def _tune(run: Run) -> tuple[list[Path], Parts]:
    import torch
    from safetensors.torch import save

    from abliterator.tuning import tune

    cost = run.plan.tuning or {}
    lessons = len(run.recipe.tuning.kl_weights)  # one round before each leg
    with run.progress.bar("tuning", lessons + cost["steps"] + cost["points"]) as advance:
        found = tune(
            _subject(run),
            extracted(run).basis,
            settings_of(run.recipe),
            on_step=lambda what: advance(1, status=what),
        )
    bases = torch.stack([setting.basis for setting in found.settings])
    write_bytes_atomic(tuned_bases_path(run), save({"bases": bases}))
    told = {
        "lessons": found.lessons,
        "points": [point.model_dump(mode="json") for point in found.points],
        "strengths": [dict(setting.strengths) for setting in found.settings],
    }
    write_text_atomic(tuning_path(run), json.dumps(told, indent=1) + "\n")
    return [tuning_path(run), tuned_bases_path(run)], {}


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


TUNING = Stage("tuning", 4, _tuning_inputs, _tune)
