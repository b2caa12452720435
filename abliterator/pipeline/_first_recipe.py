"""A recipe for a model that nobody wrote one for yet, from config and headers alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from abliterator.pipeline._plan import Plan
from abliterator.recipe import draft

# Gradients keep the activations of a whole step beside the weights, and a descent is minutes for
# 135 million parameters on two cores. Where it stops being worth a default is no measurement.
TUNED_UP_TO = 4_000_000_000  # parameters


def first_recipe(plan: Plan) -> str:
    """The text of a recipe for the planned model: layers and k by measurement, and strengths too.

    Strengths are left at 1 where tuning them would cost much, or weights are stored so that no
    gradient passes them.
    """
    chosen: dict[str, Any] = {"model": _named(plan)}
    if plan.source.revision is not None:
        chosen["revision"] = plan.source.revision
    chosen |= {"layers": "sweep", "k": "auto"}
    why_not = _untuned(plan)
    if why_not is None:
        chosen["edit"] = {"strength": "auto"}
    return draft(chosen, _preamble(plan, why_not))


def _named(plan: Plan) -> str:
    """The model as a recipe in any folder can name it."""
    local = Path(plan.source.id).expanduser()
    return str(local.resolve()) if local.is_dir() else plan.source.id


def _untuned(plan: Plan) -> str | None:
    parameters = sum(math.prod(info.shape) for info in plan.checkpoint.tensors.values())
    if "quantization_config" in plan.checkpoint.config:
        return (
            "`edit.strength: auto` is left out: the weights are quantised, and it needs gradients."
        )
    if parameters > TUNED_UP_TO:
        return (
            f"`edit.strength: auto` is left out: with {parameters / 1e9:.1f} billion parameters, "
            "tuning strengths by gradients needs a large accelerator. Add it if you have one."
        )
    return None


def _preamble(plan: Plan, why_not: str | None) -> list[str]:
    summary = plan.summary()
    writers = ", ".join(f"{n['tensors']} {component}" for component, n in plan.writers().items())
    notes = [*plan.notes, *([why_not] if why_not else [])]
    return [
        f"{plan.source.id}: {summary['model_type']}, {summary['n_layers']} layers, d_model "
        f"{summary['d_model']}, {plan.checkpoint.total_bytes / 1e9:.3f} GB",
        f"Tensors that write the residual stream: {writers}",
        *(f"Note: {note}" for note in notes),
        "",
        "What stands without a # is the whole recipe. A # with no space behind it hides a key at",
        "its default: take it away, and that of its section, to give the key another value.",
        "Next: `abliterator plan FILE` tells what it would do, `abliterator build FILE` does it.",
    ]
