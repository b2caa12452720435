"""abliterator: remove one behaviour from an open-weight language model, and measure what that did.

    from abliterator import Model, build, load_recipe

    record = build(load_recipe("recipes/demo.yaml"), Path("out"))
    record.behaviour["target"].edited.refusal

    model = Model("embedded:demo")
    model.heatmap(model.directions(target, contrast))

Names are imported when they are first used, so importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from abliterator.directions import PublishedDirections, load_directions
    from abliterator.errors import AbliteratorError
    from abliterator.model import hooked, load_model
    from abliterator.pipeline import Model, bake_subspace, build, plan_model, plan_recipe
    from abliterator.recipe import Recipe, load_recipe
    from abliterator.record import RunRecord
    from abliterator.source import resolve_folder
    from abliterator.subspace import ablate, orthonormal_basis

__all__ = [
    "AbliteratorError",
    "Model",
    "PublishedDirections",
    "Recipe",
    "RunRecord",
    "ablate",
    "bake_subspace",
    "build",
    "hooked",
    "load_directions",
    "load_model",
    "load_recipe",
    "orthonormal_basis",
    "plan_model",
    "plan_recipe",
    "resolve_folder",
]

_PACKAGE = {
    "AbliteratorError": "errors",
    "Model": "pipeline",
    "PublishedDirections": "directions",
    "Recipe": "recipe",
    "RunRecord": "record",
    "ablate": "subspace",
    "bake_subspace": "pipeline",
    "build": "pipeline",
    "hooked": "model",
    "load_directions": "directions",
    "load_model": "model",
    "load_recipe": "recipe",
    "orthonormal_basis": "subspace",
    "plan_model": "pipeline",
    "plan_recipe": "pipeline",
    "resolve_folder": "source",
}


def __getattr__(name: str) -> Any:
    if name not in _PACKAGE:
        raise AttributeError(f"module 'abliterator' has no attribute {name!r}")
    return getattr(import_module(f"abliterator.{_PACKAGE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
