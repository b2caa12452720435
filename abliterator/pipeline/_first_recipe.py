"""The draft of a recipe for a model, from its config and headers alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from abliterator.pipeline._planning._plan import Plan
from abliterator.recipe import draft, short_draft

# Gradients keep the activations of a whole step beside the weights, and a descent is minutes for
# 135 million parameters on two cores. The limit is a choice, not a measurement.
TUNED_UP_TO = 4_000_000_000  # parameters

FULL = (
    "",
    "What stands without a # is the whole recipe. A # with no space behind it hides",
    "a key at its default: take it away, and that of its section, to give the key",
    "another value.",
)
SHORT = (
    "",
    "`sweep` and `auto` find layers, their number and strengths by measurement.",
    "Prompts, judge and benchmarks are the defaults; `abliterator init --full` has",
    "every key with its explanation.",
)
NEXT = ("Next: `abliterator plan FILE` shows what `abliterator build FILE` does.",)


def first_recipe(plan: Plan, *, full: bool = True) -> str:
    """The text of a recipe for the planned model: layers and k by measurement, and strengths too.

    With `full`, every other key stands there as a comment, with its default. Strengths are left at
    1 where tuning them would cost much, or weights are stored so that no gradient passes them.
    """
    settings: dict[str, Any] = {"model": _model_name(plan)}
    if plan.source.revision is not None:
        settings["revision"] = plan.source.revision
    settings |= {"layers": "sweep", "k": "auto"}
    if plan.source.id == "embedded:demo":
        sets = ("target", "contrast", "evaluation", "neutral")
        settings["prompts"] = {name: {"path": f"embedded:demo/{name}.jsonl"} for name in sets}
        settings["rollouts"] = {"max_new_tokens": 32}
    untuned_reason = _untuned_reason(plan)
    edit: dict[str, Any] = {"strength": "auto"} if untuned_reason is None else {}
    if plan.edits.settings.partial:
        edit["partial"] = True
    if edit:
        settings["edit"] = edit
    if full:
        return draft(settings, [*_preamble(plan, untuned_reason), *FULL, *NEXT])
    return short_draft(settings, [*_preamble(plan, untuned_reason), *SHORT, *NEXT])


def _model_name(plan: Plan) -> str:
    """Hub id, or absolute path of a local folder: valid in a recipe in any folder."""
    local = Path(plan.source.id).expanduser()
    return str(local.resolve()) if local.is_dir() else plan.source.id


def _untuned_reason(plan: Plan) -> str | None:
    """Why strengths are left at 1; None where the draft tunes them."""
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


def _preamble(plan: Plan, untuned_reason: str | None) -> list[str]:
    summary = plan.summary()
    writers = ", ".join(f"{n['tensors']} {component}" for component, n in plan.writers().items())
    notes = [*plan.notes, *([untuned_reason] if untuned_reason else [])]
    if plan.anatomy.partial:
        notes.append(
            f"`edit.partial`: the stream keeps a part of the directions, because "
            f"{plan.anatomy.partial}."
        )
    return [
        f"{plan.source.id}: {summary['model_type']}, {summary['n_layers']} layers, d_model "
        f"{summary['d_model']}, {plan.checkpoint.total_bytes / 1e9:.3f} GB",
        f"Tensors that write the residual stream: {writers}",
        *(f"Note: {note}" for note in notes),
    ]
