"""What a build would lack, found before anything heavy, each with what mends it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from abliterator.errors import AbliteratorError
from abliterator.pipeline._judges import require_key
from abliterator.pipeline._local_judge import judge_source
from abliterator.pipeline._planning._plan import Plan, require_room
from abliterator.pipeline._planning._planned_prompts import PlannedPrompts
from abliterator.recipe import Recipe


class Missing(BaseModel):
    """One thing that a build needs and this machine has not.

    Attributes:
        what: "prompts", "dataset", "key", "judge", "extra", "disk", "memory" or "device".
        problem: what was seen and expected, and what to do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    what: str
    problem: str


def missing(recipe: Recipe, plan: Plan, prompts: PlannedPrompts, out: Path) -> Iterator[Missing]:
    """Everything that would stop the build of a recipe later, as far as no model is needed.

    Args:
        recipe: that would be built.
        plan: of it.
        prompts: its prompt sets.
        out: where it would be built.
    """
    yield from (Missing(what="prompts", problem=problem) for problem in prompts.problems)
    yield from _datasets(recipe)
    checks: dict[str, Callable[[], Any]] = {
        "key": lambda: require_key(recipe.judge),
        "judge": lambda: _require_judge(recipe, plan),
        "extra": lambda: _require_engine(recipe),
        "disk": lambda: require_room(plan, out),
    }
    for what, check in checks.items():
        try:
            check()
        except AbliteratorError as error:
            yield Missing(what=what, problem=str(error))


def _require_judge(recipe: Recipe, plan: Plan) -> None:
    """Raises CheckpointError for a local judge that is not here and cannot be downloaded."""
    from huggingface_hub import constants

    if recipe.judge.kind == "local" and constants.HF_HUB_OFFLINE:
        judge_source(recipe.judge, plan.source)


def _require_engine(recipe: Recipe) -> None:
    section = recipe.benchmarks
    if section.engine.kind != "transformers" and (section.preset or section.tasks):
        from abliterator.benchmarks import require_engine

        require_engine(section.engine)


def _datasets(recipe: Recipe) -> Iterator[Missing]:
    """Datasets that are not in the Hub's cache while the Hub may not be asked."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        return
    names = {s.dataset for s in recipe.prompts.sources.values() if s.dataset is not None}
    for name in sorted(names):
        folder = f"datasets--{name.replace('/', '--')}"
        if not (Path(constants.HF_HUB_CACHE) / folder).is_dir():
            yield Missing(
                what="dataset",
                problem=f"The dataset {name} is not in the Hub's cache, and HF_HUB_OFFLINE is "
                f"{os.environ.get('HF_HUB_OFFLINE')}. Fetch it with a connection: `hf download "
                f"{name} --repo-type dataset`, or give prompts of your own with `path`.",
            )
