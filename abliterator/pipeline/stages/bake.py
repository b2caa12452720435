"""The stages that make the edited checkpoint: prompts, directions, bake, adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterator.bake import bake, write_adapter, write_config
from abliterator.checkpoint import CONFIG_FILE
from abliterator.files import read_text, sha256_of_file, write_text_atomic
from abliterator.pipeline._chosen import chosen
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Parts, Stage
from abliterator.pipeline._tuned import planned_edits, tuned_inputs, tuned_subspace
from abliterator.pipeline._workspace import remove_whole
from abliterator.pipeline.stages.capture import differences, fitted, shuffled
from abliterator.pipeline.stages.prompts import (
    compared,
    load_sets,
    prompts_path,
    remarks,
    set_apart,
    with_pairs,
)
from abliterator.recipe import Prompts, Source
from abliterator.record import TensorEdit
from abliterator.verification import EDITS

if TYPE_CHECKING:
    from abliterator.directions import Subspace
    from abliterator.selection import Pool


def _prompts_inputs(run: Run) -> Any:
    recipe = run.recipe
    sources = [getattr(recipe.prompts, name) for name in Prompts.model_fields]
    files = [s.path for s in sources if isinstance(s, Source) and s.path is not None]
    return [
        recipe.published()["prompts"],
        recipe.directions.projection,
        recipe.seed,
        recipe.selection.prompts if recipe.selects or recipe.tunes else None,
        [recipe.tunes, recipe.directions.stack],
        [sha256_of_file(path) for path in files if path.is_file()],
    ]


def _prompts(run: Run) -> tuple[list[Path], Parts]:
    neutral_too = run.recipe.directions.projection == "neutral" or run.recipe.tunes
    sets = load_sets(run.recipe.prompts, seed=run.recipe.seed, neutral_too=neutral_too)
    if run.recipe.selects or run.recipe.tunes:
        few, seed = run.recipe.selection.prompts, run.recipe.seed
        sets = set_apart(sets, run.recipe.prompts, prompts=few, seed=seed)
    if run.recipe.directions.stack == "within_layer":
        sets = with_pairs(sets, run.recipe.prompts)
    sets = compared(sets)
    for remark in remarks(sets):
        run.progress.note(remark)
    path = prompts_path(run)
    write_text_atomic(path, json.dumps(sets.to_json(), indent=1, ensure_ascii=False) + "\n")
    return [path], {}


def _directions_inputs(run: Run) -> Any:
    settings = run.recipe.directions.model_dump(mode="json")
    return [run.digest("capture"), settings, chosen(run), tuned_inputs(run)]


def directions_path(run: Run) -> Path:
    """Where the directions stage leaves directions and subspace."""
    return run.workspace.work / "directions.safetensors"


def removed_subspace(run: Run) -> Subspace:
    """The subspace that is removed from the weights."""
    from abliterator.directions import load_subspace

    return load_subspace(run.artefact("directions", directions_path(run)))


def _directions(run: Run) -> tuple[list[Path], Parts]:
    from abliterator.directions import save_directions

    path = directions_path(run)
    found = chosen(run)
    subspace = tuned_subspace(run, found.layers) or extracted(run)
    save_directions(path, fitted(run)[found.places[0].position], subspace)
    return [path], {}


def extracted(run: Run) -> Subspace:
    """The subspace that was chosen, as activations give it."""
    from abliterator.directions import per_layer

    found = chosen(run)
    if run.recipe.directions.stack == "per_layer":
        return per_layer(fitted(run)[found.places[0].position], found.layers)
    return pool_of(run).stack(found.places, found.k)


def pool_of(run: Run) -> Pool:
    """All that may be stacked: the plan's layers at the captured positions."""
    from abliterator.directions import Place
    from abliterator.selection import Pool

    directions = fitted(run)
    return Pool(
        places=[Place(layer, position) for layer in run.plan.layers for position in directions],
        directions=directions,
        shuffled=shuffled(run),
        differences=differences(run),
    )


def _bake_inputs(run: Run) -> Any:
    edit = run.recipe.edit.model_dump(mode="json", exclude={"output"})
    return [run.base_digest(), run.digest("directions"), edit, tuned_inputs(run)]


def _bake(run: Run) -> tuple[list[Path], Parts]:
    run.free()  # baking needs no model, and the files may be as large as the memory
    subspace = removed_subspace(run)
    out = run.workspace.checkpoint
    remove_whole(out)  # what an earlier recipe left there is not part of this checkpoint
    try:
        with run.progress.bar("bake", run.plan.checkpoint.total_bytes) as advance:
            edits = bake(
                run.plan.checkpoint,
                planned_edits(run),
                subspace.basis,
                out,
                made_from=_made_from(run),
                on_bytes=advance,
            )
        write_text_atomic(out / EDITS, edits_json(edits))
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)  # no loader takes a part for the whole
        raise
    config = out / CONFIG_FILE  # left to the next stage
    return [path for path in out.rglob("*") if path.is_file() and path != config], {}


def _made_from(run: Run) -> dict[str, str]:
    return {"recipe_digest": run.recipe.digest}


def _config_inputs(run: Run) -> Any:
    return [run.digest("bake"), _made_from(run)]


def _config(run: Run) -> tuple[list[Path], Parts]:
    plan, out = planned_edits(run), run.workspace.checkpoint
    write_config(run.plan.checkpoint, plan, out, _made_from(run))
    return [run.workspace.checkpoint / CONFIG_FILE], {}


def _adapter_inputs(run: Run) -> Any:
    return [run.digest("bake"), run.digest("directions"), run.base_id, run.plan.source.revision]


def _adapter(run: Run) -> tuple[list[Path], Parts]:
    written = write_adapter(
        run.plan.checkpoint,
        planned_edits(run),
        removed_subspace(run).basis,
        run.workspace.adapter,
        base_model=run.base_id,
        revision=run.plan.source.revision,
    )
    return list(written), {}


def edits_json(edits: Iterable[TensorEdit]) -> str:
    """The text of edits.json."""
    return json.dumps([edit.model_dump(mode="json") for edit in edits], indent=1) + "\n"


def tensor_edits(run: Run) -> list[TensorEdit]:
    """What was done to each edited tensor."""
    path = run.artefact("bake", run.workspace.checkpoint / EDITS)
    return [TensorEdit.model_validate(edit) for edit in json.loads(read_text(path))]


PROMPTS = Stage("prompts", 4, _prompts_inputs, _prompts)
DIRECTIONS = Stage("directions", 2, _directions_inputs, _directions)
BAKE = Stage("bake", 2, _bake_inputs, _bake)
# Apart from the weights: it names the whole recipe, and another judge must not bake them again.
CONFIG = Stage("config", 1, _config_inputs, _config)
ADAPTER = Stage("adapter", 1, _adapter_inputs, _adapter)
