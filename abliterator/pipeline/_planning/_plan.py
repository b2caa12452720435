"""What a recipe will do, computed from config.json and safetensors headers alone.

No weights are read, and torch is not loaded.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterator.anatomy import Anatomy, anatomy_of
from abliterator.bake import (
    PANEL_ELEMENTS,
    EditPlan,
    bake_workers,
    plan_edits,
    require_adapter_form,
)
from abliterator.checkpoint import Checkpoint, auxiliary_files, card_metadata, declared_base_models
from abliterator.errors import OutputError, RecipeError
from abliterator.files import free_bytes, require_utf8_name
from abliterator.formats import require_known_names, storage_of
from abliterator.pipeline._planning._model_notes import notes_on
from abliterator.pipeline._planning._quantization import storage_ways
from abliterator.recipe import Edit, Recipe
from abliterator.source import ModelSource

if TYPE_CHECKING:
    from abliterator.pipeline._planning._estimate import Estimate
    from abliterator.pipeline._planning._missing import Missing
    from abliterator.pipeline._planning._planned_prompts import PlannedPrompts
    from abliterator.pipeline._planning._where import Where

# Left free beside the checkpoint: the work folder, and some space for the file system.
DISK_RESERVE = 64 << 20

# Panels of float32 numbers that the edit of a tensor holds at most, with what the allocator does
# not return: measured at d_model 2048 and k = 1 to 16 as the process's largest resident set,
# less what it was before (12 in bfloat16, 22 in float32, 25 in MXFP4; compensated 36, 60, 30).
_PANELS, _COMPENSATED_PANELS = 28, 44


@dataclass(frozen=True)
class Plan:
    """A checkpoint, the classification of its tensors, and the planned edits.

    `carried` are the files that go along with the weights, and `carried_bytes` their size.
    `layers` and `k` are those of a recipe; without one they are empty and 0. Where a selection
    chooses, `layers` are its candidates, k is 0, and `selection` is what it costs at most; `tuning`
    is what a tuning costs. `notes` are what a user should know before anything heavy runs. `card`
    is the front matter of the model's own README.md; empty where it has none that can be read.

    `where` the weights will lie, the `prompts`, the `estimate` of time and memory (None where this
    machine was not measured) and what is `missing` are there where `plan_recipe` or `plan_model`
    made the plan.
    """

    source: ModelSource
    checkpoint: Checkpoint
    anatomy: Anatomy
    edits: EditPlan
    carried: tuple[str, ...]
    carried_bytes: int
    left_out: tuple[str, ...]
    free_bytes: int
    layers: tuple[int, ...] = ()
    k: int = 0
    selection: Mapping[str, int] | None = None
    tuning: Mapping[str, int] | None = None
    notes: tuple[str, ...] = ()
    card: Mapping[str, Any] = field(default_factory=dict)
    where: Where | None = None
    prompts: PlannedPrompts | None = None
    estimate: Estimate | None = None
    missing: tuple[Missing, ...] = ()

    @property
    def output_bytes(self) -> int:
        """Size of the edited checkpoint's files."""
        added = self.edits.added_bytes(self.checkpoint)
        return self.checkpoint.total_bytes + self.carried_bytes + added

    @property
    def bake_memory(self) -> int:
        """Bytes that baking needs at most, by as many threads as this machine gives it.

        What Python and torch take by themselves is not in it.
        """
        return self.edit_memory * bake_workers(self.checkpoint, self.edits)

    @property
    def edit_memory(self) -> int:
        """Bytes that one thread of a bake needs at most: the largest edited tensor, and panels."""
        panels = _PANELS
        if self.edits.settings.rounding == "compensated":
            wide = any(edit.info.dtype == "F32" for edit in self.edits.edits)  # float64 then
            panels = _COMPENSATED_PANELS * (2 if wide else 1)
        return self.edits.largest_bytes(self.checkpoint) + panels * PANEL_ELEMENTS * 4

    def writers(self) -> dict[str, dict[str, int]]:
        """Per component: tensors that write the stream, in how many blocks, and how many edited.

        `expected` are those that the architecture has, layers x modules x experts; all of them are
        there, for a missing one would have stopped the plan.
        """
        edited = {edit.writer.name for edit in self.edits.edits}
        counts: dict[str, dict[str, int]] = {}
        for component in dict.fromkeys(writer.component for writer in self.edits.writers):
            writers = [w for w in self.edits.writers if w.component == component]
            counts[component] = {
                "tensors": sum(w.name in self.checkpoint.tensors for w in writers),
                "expected": len(writers),
                "blocks": len({w.layer for w in writers if w.layer >= 0}),
                "edited": sum(w.name in edited for w in writers),
            }
        return counts

    def summary(self) -> dict[str, Any]:
        """The plan as plain values, for `--json` and for people."""
        planned = Counter(edit.writer.component for edit in self.edits.edits)
        return {
            "model": self.source.id,
            "revision": self.source.revision,
            "model_type": self.anatomy.model_type,
            "n_layers": self.anatomy.n_layers,
            "d_model": self.anatomy.d_model,
            "tied_embeddings": self.anatomy.tied_embeddings,
            "layers": list(self.layers[: self.k] if self.selection is None else self.layers),
            "k": self.k,
            "selection": self.selection and dict(self.selection),
            "tuning": self.tuning and dict(self.tuning),
            "edit": self._edit(),
            "writers": self.writers(),
            "n_experts": self.anatomy.n_experts,
            "through_gains": sum(bool(edit.writer.gains) for edit in self.edits.edits),
            "formats": dict(Counter(edit.info.dtype for edit in self.edits.edits)),
            "quantised": storage_ways(self.edits, self.checkpoint, self.k),
            "left_alone": self.anatomy.left_alone(self.checkpoint.tensors),
            "edited_tensors": dict(planned),
            "untouched_tensors": len(self.checkpoint.tensors) - len(self.edits.edits),
            "bytes": {
                "read": self.checkpoint.total_bytes,
                "edited": self.edits.edited_bytes,
                "written": self.output_bytes,
                "free": self.free_bytes,
            },
            "bake_memory": self.bake_memory,
            "model_memory": sum(info.nbytes for info in self.checkpoint.tensors.values()),
            "files": {
                "weights": list(self.checkpoint.weight_files),
                "carried": list(self.carried),
                "left_out": list(self.left_out),
            },
            "where": self.where and self.where.model_dump(),
            "prompts": self.prompts and self.prompts.counts(),
            "estimate": self.estimate and self.estimate.summary(),
            "missing": [missing.model_dump() for missing in self.missing],
            "partial": self.anatomy.partial,
            "notes": list(self.notes),
        }

    def _edit(self) -> dict[str, Any]:
        """The edit's settings, with the strengths and experts that they mean in this model."""
        edit, n_layers = self.edits.settings, self.anatomy.n_layers
        in_model = {"strength": edit.strengths_in(n_layers), "experts": edit.experts_in(n_layers)}
        return {**edit.model_dump(exclude={"output"}), **in_model}


def make_plan(source: ModelSource, edit: Edit | None, out: Path) -> Plan:
    """Opens the checkpoint and classifies every tensor.

    Without an `edit` it is `Edit()`, partial where the model can be edited in part only.

    Raises:
        CheckpointError: for a damaged or incomplete folder.
        RecipeError: for strengths of blocks that the model does not have.
        UnsupportedModel: for an architecture, tensor or format that is not known.
    """
    require_utf8_name(out)
    checkpoint = Checkpoint.open(source.folder)
    card = card_metadata(source.folder)
    made_from = declared_base_models(card or {})
    # before the anatomy, which cannot name the base
    storage = storage_of(checkpoint.config, made_from)
    require_known_names(checkpoint.tensors, storage.owner, made_from)
    anatomy = anatomy_of(checkpoint.config)
    carried, left_out = auxiliary_files(source.folder)
    edit = edit or Edit(partial=anatomy.partial is not None)
    return Plan(
        source,
        checkpoint,
        anatomy,
        plan_edits(checkpoint, anatomy, edit),
        tuple(carried),
        sum((source.folder / name).stat().st_size for name in carried),
        tuple(left_out),
        free_bytes(out),
        notes=notes_on(source, checkpoint, anatomy, card),
        card=card or {},
    )


def plan_source(source: ModelSource, recipe: Recipe, out: Path) -> Plan:
    """The plan of a recipe for a resolved model.

    Raises:
        AbliteratorError: for a model, an edit or layers that cannot be built.
    """
    plan = make_plan(source, recipe.edit, out)
    layers, k = require_layers(recipe, plan.anatomy)
    if recipe.edit.adapts:
        require_adapter_form(plan.edits)
    return replace(
        plan,
        layers=layers,
        k=k,
        selection=selection_cost(recipe, len(layers)),
        tuning=tuning_cost(recipe),
        notes=(
            *plan.notes,
            *_position_notes(recipe),
            *_vector_notes(recipe, plan.anatomy),
            *_stack_notes(recipe, layers[:k]),
        ),
    )


def _stack_notes(recipe: Recipe, layers: tuple[int, ...]) -> tuple[str, ...]:
    """What is promised where no subspace is removed."""
    if recipe.directions.stack != "sequential":
        return ()
    return (
        "`stack: sequential` removes the directions one after the other, "
        f"{' then '.join(f'layer {layer}' for layer in layers)}: only the last "
        "is gone entirely, and where they are not orthogonal a part of each earlier one is left. "
        "The record has how much (`directions.left_behind`).",
    )


def _vector_notes(recipe: Recipe, anatomy: Anatomy) -> tuple[str, ...]:
    """What is stored of single prompts, where their means are not enough."""
    settings = recipe.directions
    if not settings.stored_sets - {"differences"}:
        return ()
    reader = "stack: som" if settings.stack == "som" else f"estimator: {settings.estimator}"
    size = 4 * anatomy.n_layers * anatomy.d_model / 1e6
    return (
        f"`{reader}` reads the activations of single prompts: {size:.2g} MB for each prompt and "
        "position are held in memory during the capture, and kept in work/vectors.safetensors.",
    )


def _position_notes(recipe: Recipe) -> tuple[str, ...]:
    """Where in a prompt directions are taken, where that is no token of the template."""
    positions, rollouts = recipe.directions.positions, recipe.rollouts
    if len(positions) > 1:
        yielded = [f"A sweep tries the positions {', '.join(map(str, positions))} of every layer."]
    else:
        yielded = []
    if "instruction" in positions:
        yielded.append(
            "`position: instruction` takes directions at the last token of the user's own text, "
            "before what the chat template adds."
        )
    if "after_thinking" in positions:
        yielded.append(
            "`position: after_thinking` takes directions where the answer begins, behind the "
            f"base's own thinking: it first thinks up to {rollouts.most_thinking} tokens about "
            "each prompt, and prompts on which it comes to no answer are left out."
        )
    return tuple(yielded)


def require_room(plan: Plan, out: Path) -> None:
    """Raises OutputError if the disk of `out` has too little space for the edited checkpoint."""
    needed = plan.output_bytes + DISK_RESERVE
    if plan.free_bytes < needed:
        raise OutputError(
            f"The edited checkpoint needs {needed / 1e9:.2f} GB, and the disk of {out} has "
            f"{plan.free_bytes / 1e9:.2f} GB free. Make room, or choose another --out."
        )


def require_layers(recipe: Recipe, anatomy: Anatomy) -> tuple[tuple[int, ...], int]:
    """The layers (the candidates, for a sweep) and k (0 where it is to be chosen) of a recipe.

    Raises:
        RecipeError: for layers the model does not have, a selection that cannot be made, and an
            edit that has to be tried at run time and cannot.
    """
    if (recipe.selects or recipe.tunes) and recipe.edit.norm != "none":
        raise RecipeError(
            "`layers: sweep`, `k: auto`, `strength: auto` and `estimator: tuned` try edits at run "
            f"time, and `edit.norm: {recipe.edit.norm}` has no run-time form. Leave `norm: none`, "
            "or give layers, k and strengths."
        )
    if recipe.layers == "sweep":
        candidates = tuple(recipe.selection.candidates(anatomy.n_layers))
        directions = recipe.directions
        several = directions.sweeps_positions or directions.of_one_layer
        if recipe.k != "auto" and recipe.k > len(candidates) and not several:
            raise RecipeError(
                f"`k` is {recipe.k}, but the sweep has only {len(candidates)} candidate layers of "
                f"{anatomy.n_layers} (`selection.skip_last` {recipe.selection.skip_last:g})."
            )
        return candidates, 0
    beyond = [layer for layer in recipe.layers if layer > anatomy.n_layers]
    if beyond:
        raise RecipeError(
            f"`layers` names {', '.join(map(str, beyond))}, but the model has layers 1 to "
            f"{anatomy.n_layers} (layer l is the residual stream that enters block l)."
        )
    return recipe.layers, 0 if recipe.selects or recipe.k == "auto" else recipe.k


def selection_cost(recipe: Recipe, n_layers: int) -> dict[str, int] | None:
    """Approximate counts of a selection's work; None where the recipe gives layers and k.

    How many positions there are, only the tokenizer knows: `candidates` counts layers.
    Candidates that come back for the last rung are not counted.
    """
    if not recipe.selects:
        return None
    settings, within = recipe.selection, recipe.directions.of_one_layer and not recipe.sweeps_nodes
    sizes = settings.stacks if recipe.k == "auto" else (recipe.k,)
    candidates = n_layers if recipe.sweeps else 0
    if recipe.sweeps_nodes:
        candidates = math.prod(recipe.directions.grid)
    judged = raced = 0
    if candidates:
        judged = max(settings.survivors, 1 if within else max(sizes))
        if recipe.sweeps_nodes:
            judged = min(candidates, judged)
        elif recipe.directions.position != "sweep":
            judged = min(n_layers * len(recipe.directions.positions), judged)
        answered, least = 0, 1 if within else sizes[0]
        for racing, prompts in settings.schedule(judged, settings.prompts, least):
            raced += racing * (prompts - answered)
            answered = prompts
    most = candidates or n_layers
    stacks = sum(size <= most or within for size in sizes) if recipe.k == "auto" else 0
    # the base's, to both sets; with each stack, random directions and shuffled labels
    base = settings.prompts + settings.scored
    answers = base + settings.prompts * (1 + 2 * settings.controls) * stacks + raced
    return {
        "candidates": candidates,
        **({"nodes": candidates} if recipe.sweeps_nodes else {}),
        "every_position": int(recipe.directions.position == "sweep"),
        "judged": judged,
        "stacks": stacks,
        "prompts": settings.prompts,
        "answers": answers,
        "tokens": answers * settings.tokens,
    }


def tuning_cost(recipe: Recipe) -> dict[str, int] | None:
    """Counts of a tuning's work; None where nothing is tuned."""
    if not recipe.tunes:
        return None
    tuning = recipe.tuning
    return {
        "steps": len(tuning.kl_weights) * tuning.steps,
        "trials": 1 + len(tuning.kl_weights) * len(tuning.scales),  # with the plain edit
        "answers_a_trial": recipe.selection.prompts,
        "tokens": recipe.selection.tokens,
    }
