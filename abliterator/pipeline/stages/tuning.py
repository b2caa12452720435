"""Strengths and directions by gradients, for recipes that ask for it.

The stage writes every tuned edit to work/tuning.json and work/tuning.safetensors; the recipe's
preferences select the one that is baked when they are read (`planned_edits`, `tuned_subspace`).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterator.bake import EditPlan, start_pairs
from abliterator.files import Journal, write_bytes_atomic
from abliterator.pipeline._judges import choosing_judge
from abliterator.pipeline._kept import partial_file
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Artefact, Stage
from abliterator.pipeline.stages.capture import fitted
from abliterator.pipeline.stages.prompts import prompt_sets
from abliterator.pipeline.stages.selection import (
    extracted_subspace,
    held_out_context,
    rendered,
    sampled,
    selected_layers,
)
from abliterator.record import Tuning

if TYPE_CHECKING:
    from torch import Tensor

    from abliterator.directions import Subspace
    from abliterator.engines import Steering
    from abliterator.tuning import TuningContext


TUNED = Artefact("tuning", "work/tuning.json")  # trials, and the strengths of each
# `bases` [trials, H, k] in the same order; [trials, L, H, k], or [trials, M, 2, H, r] of modules
BASES = Artefact("tuning", "work/tuning.safetensors")


def _key(run: Run) -> Any:
    recipe, sets = run.recipe, prompt_sets(run)
    sections = ("chat", "directions", "edit")
    return [
        run.base_digest(),
        run.digest("capture"),
        selected_layers(run),
        {name: run.section(name) for name in sections},
        {name: s.sha256 for name, s in {**sets.extraction, **sets.selection}.items()},
        # the preferences are not part of the key: another trial needs no other descent
        run.section("tuning", exclude=("prefer", "at_most", "max_change")),
        [recipe.seed, recipe.selection.tokens, recipe.selection.batch_size],
        [recipe.selection.rungs, recipe.selection.keep],  # how trials are raced
        choosing_judge(run).identity.model_dump(mode="json"),
        run.dtype,
    ]


def _run(run: Run) -> list[Path]:
    import torch
    from safetensors.torch import save

    from abliterator.tuning import tune

    cost = run.plan.tuning or {}
    settings = run.recipe.selection
    rounds = len(run.recipe.tuning.kl_weights)  # of answers, one before each phase
    rungs = settings.schedule(cost["trials"], settings.prompts, 1)
    steps = rounds + cost["steps"] + 1 + len(rungs)
    journal = Journal(partial_file(run, "tuning", "steps.jsonl", _key(run)))
    kept = Counter(value["step"] for value in journal.values)
    done = kept.total() + kept["phase"] * (run.recipe.tuning.steps - 1)
    with run.progress.bar("tuning", max(0, steps - done)) as advance:
        tuned = tune(
            _context(run),
            _start(run),
            settings,
            scratch=run.workspace.work / "base_logits.bin",
            journal=journal,
            on_step=lambda name: advance(1, status=name),
        )
    bases = torch.stack([edit.basis for edit in tuned.edits])
    write_bytes_atomic(BASES.path(run), save({"bases": bases}))
    result = Tuning(
        preference_pairs=tuned.preference_pairs,
        trials=tuple(tuned.trials),
        strengths=tuple(dict(edit.strengths) for edit in tuned.edits),
    )
    return [TUNED.write(run, result), BASES.path(run)]


def _start(run: Run) -> Tensor:
    """What the descent begins with: the extracted Q, or for each module the U and V that remove it.

    These are rounded to float32, in which the checkpoint's file of directions has them.
    """
    basis = extracted_subspace(run).basis
    if run.recipe.directions.stack != "per_writer":
        return basis
    return start_pairs(run.plan.edits, run.plan.checkpoint, basis).float().double()


def _difference(run: Run) -> Steering:
    """The extracted direction of the first layer, at its length."""
    from abliterator.engines import Steering

    place = selected_layers(run).places[0]
    return Steering(place.layer, fitted(run)[place.position].vectors[place.layer - 1])


def _context(run: Run) -> TuningContext:
    from abliterator.tuning import TuningContext

    recipe, config = run.recipe, run.recipe.tuning
    target, neutral, contrast = (
        sampled(run, name, config.prompts) for name in ("target", "neutral", "contrast")
    )
    return TuningContext(
        difference=_difference(run) if config.induce else None,
        evaluation=held_out_context(run, kl_tokens=config.tokens, batch_size=recipe.selection.rows),
        loaded=run.loaded(run.plan.source.folder),
        target=rendered(run, target, name="target"),
        # the contrast must stay as it was too: it is as like target as can be
        neutral=rendered(run, neutral + contrast, name="neutral and contrast"),
        config=config,
        strengths=recipe.edit.strength == "auto",
        directions=recipe.directions.estimator == "tuned",
    )


def tuning_of(run: Run) -> Tuning | None:
    """All trials and which one the recipe prefers; None where nothing is tuned.

    Raises:
        DirectionError: if no trial keeps the recipe's limit.
    """
    from abliterator.tuning import prefer

    if not run.recipe.tunes:
        return None
    tuning = TUNED.read_as(run, Tuning)
    settings, max_kl = run.recipe.tuning, run.recipe.selection.max_kl
    selected = prefer(tuning.trials, settings.prefer, settings.at_most, max_kl=max_kl)
    return tuning.model_copy(update={"selected": selected})


def tuning_record(run: Run) -> Tuning | None:
    """`tuning_of` for the record, without the strengths, which are in edits.json."""
    tuning = tuning_of(run)
    return tuning and tuning.model_copy(update={"strengths": ()})


def tuned_subspace(run: Run, layers: tuple[int, ...]) -> Subspace | None:
    """The subspace of the selected trial; None where nothing is tuned."""
    from safetensors.torch import load_file

    from abliterator.directions import Subspace

    tuning = tuning_of(run)
    if tuning is None or tuning.selected is None:
        return None
    bases = load_file(BASES.checked(run))["bases"]
    return Subspace(bases[tuning.selected], layers)


def planned_edits(run: Run) -> EditPlan:
    """The tensors to edit and their strengths: the plan's, or tuned ones where the recipe tunes."""
    tuning = tuning_of(run)
    if tuning is None or tuning.selected is None:
        return run.plan.edits
    return run.plan.edits.with_strengths(tuning.strengths[tuning.selected])


def tuned_inputs(run: Run) -> Any:
    """Key of the selected trial, for stages that depend on it; None where nothing is tuned."""
    tuning = tuning_of(run)
    return tuning and [run.digest("tuning"), tuning.selected]


TUNING = Stage("tuning", 6, _key, _run, asks_model=True)
