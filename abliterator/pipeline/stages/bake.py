"""The edited checkpoint without its config.json, and the list of edited tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from abliterator.bake import bake, bake_on_workers, require_bounded
from abliterator.checkpoint import CONFIG_FILE
from abliterator.files import write_text_atomic
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Artefact, Stage
from abliterator.pipeline._workspace import remove_whole
from abliterator.pipeline.stages.directions import removed_subspace
from abliterator.pipeline.stages.tuning import planned_edits, tuned_inputs
from abliterator.record import TensorEdit
from abliterator.verification import EDITS, read_edits

TENSOR_EDITS = Artefact("bake", f"checkpoint/{EDITS}")


def _key(run: Run) -> Any:
    edit = run.section("edit", exclude=("output",))
    key = [run.base_digest(), run.digest("directions"), edit, tuned_inputs(run)]
    return [*key, run.recipe.tuning.max_change] if _has_pairs(run) else key


def _has_pairs(run: Run) -> bool:
    return run.recipe.directions.stack == "per_writer"


def _run(run: Run) -> list[Path]:
    bake_files = _bake_of(run)
    subspace = removed_subspace(run)
    out = run.workspace.checkpoint
    if _has_pairs(run):
        most = run.recipe.tuning.max_change
        require_bounded(run.plan.checkpoint, planned_edits(run), subspace.basis, most)
    remove_whole(out)  # what an earlier recipe left there is not part of this checkpoint
    total = run.plan.checkpoint.total_bytes
    try:
        with run.progress.bar("bake", total, unit="B") as advance:
            edits = bake_files(
                run.plan.checkpoint,
                planned_edits(run),
                subspace.basis,
                out,
                made_from=made_from(run),
                on_bytes=advance,
            )
        write_text_atomic(out / EDITS, edits_json(edits))
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)  # so that no loader reads an incomplete checkpoint
        raise
    config = out / CONFIG_FILE  # left to the next stage
    return [path for path in out.rglob("*") if path.is_file() and path != config]


def _bake_of(run: Run) -> Callable[..., tuple[TensorEdit, ...]]:
    """What bakes: the run's workers, if there are some and several files; else this process."""
    settings = run.options.pool
    if settings is not None and len(run.plan.checkpoint.weight_files) > 1:
        return partial(bake_on_workers, run.workers(settings))
    run.free()  # baking needs no model, and the files may be as large as the memory
    return bake


def made_from(run: Run) -> dict[str, str]:
    """The origin of the weights that config.json names."""
    return {"recipe_digest": run.recipe.digest}


def edits_json(edits: Iterable[TensorEdit]) -> str:
    """The text of edits.json."""
    return json.dumps([edit.model_dump(mode="json") for edit in edits], indent=1) + "\n"


def tensor_edits(run: Run) -> tuple[TensorEdit, ...]:
    """The edited tensors, as edits.json has them."""
    TENSOR_EDITS.checked(run)
    return read_edits(run.workspace.checkpoint)


BAKE = Stage("bake", 2, _key, _run)
