"""The stages that make the edited checkpoint: prompts, capture, directions, bake, adapter."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterator.bake import bake, write_adapter, write_config
from abliterator.checkpoint import CONFIG_FILE, write_text_atomic
from abliterator.pipeline._chosen import chosen_layers
from abliterator.pipeline._prompt_sets import PromptSets, load_sets, set_apart
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Parts, Stage
from abliterator.pipeline._tuned import planned_edits, tuned_inputs, tuned_subspace
from abliterator.recipe import Prompts, Source
from abliterator.record import TensorEdit

if TYPE_CHECKING:
    from abliterator.directions import Directions, Subspace
    from abliterator.prompts import PromptSet


def _prompts_inputs(run: Run) -> Any:
    recipe = run.recipe
    sources = [getattr(recipe.prompts, name) for name in Prompts.model_fields]
    files = [s.path for s in sources if isinstance(s, Source) and s.path is not None]
    return [
        recipe.published()["prompts"],
        recipe.directions.projection,
        recipe.seed,
        recipe.selection.prompts if recipe.selects or recipe.tunes else None,
        recipe.tunes,
        [hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()],
    ]


def _prompts(run: Run) -> tuple[list[Path], Parts]:
    neutral_too = run.recipe.directions.projection == "neutral" or run.recipe.tunes
    sets = load_sets(run.recipe.prompts, seed=run.recipe.seed, neutral_too=neutral_too)
    if run.recipe.selects or run.recipe.tunes:
        few, seed = run.recipe.selection.prompts, run.recipe.seed
        sets = set_apart(sets, run.recipe.prompts, prompts=few, seed=seed)
    path = run.workspace.work / "prompts.json"
    write_text_atomic(path, json.dumps(sets.to_json(), indent=1, ensure_ascii=False) + "\n")
    return [path], {}


def prompt_sets(run: Run) -> PromptSets:
    """The prompt sets as used."""
    return PromptSets.from_json(json.loads((run.workspace.work / "prompts.json").read_text()))


def _capture_inputs(run: Run) -> Any:
    recipe = run.recipe
    return [
        run.base_digest(),
        recipe.chat.model_dump(mode="json"),
        recipe.capture.model_dump(mode="json"),
        recipe.directions.position,
        {name: s.sha256 for name, s in _captured(run).items()},
        run.dtype,
    ]


def _captured(run: Run) -> dict[str, PromptSet]:
    """The sets whose moments a direction is made of."""
    sets = prompt_sets(run).extraction
    unused = {"neutral"} if run.recipe.directions.projection == "none" else set()
    return {name: prompts for name, prompts in sets.items() if name not in unused}


def _capture(run: Run) -> tuple[list[Path], Parts]:
    from abliterator.capture import capture, save_moments
    from abliterator.model import block_paths

    settings = run.recipe.capture
    loaded = run.loaded(run.plan.source.folder)
    moments = {}
    for name, prompts in _captured(run).items():
        with run.progress.bar(f"capture {name}", len(prompts.prompts)) as advance:
            moments[name] = capture(
                loaded,
                run.render(loaded, prompts.prompts),
                blocks=block_paths(run.plan.anatomy.blocks, run.plan.anatomy.n_layers),
                position=run.recipe.directions.position,
                padding=settings.padding,
                max_batch_tokens=settings.max_batch_tokens,
                on_batch=advance,
            )
    path = run.workspace.work / "moments.safetensors"
    save_moments(path, moments)
    return [path], {}


def _directions_inputs(run: Run) -> Any:
    settings = run.recipe.directions.model_dump(mode="json")
    return [run.digest("capture"), settings, chosen_layers(run), tuned_inputs(run)]


def _directions(run: Run) -> tuple[list[Path], Parts]:
    from abliterator.directions import save_directions

    path = run.workspace.work / "directions.safetensors"
    subspace = tuned_subspace(run, chosen_layers(run)) or extracted(run)
    save_directions(path, fitted(run), subspace)
    return [path], {}


def extracted(run: Run) -> Subspace:
    """The subspace of the chosen layers, as activations give it."""
    from abliterator.directions import stack

    return stack(fitted(run), chosen_layers(run))


def fitted(run: Run) -> Directions:
    """The directions of all layers, from what was captured."""
    from abliterator.capture import load_moments
    from abliterator.directions import fit_directions

    moments = load_moments(run.workspace.work / "moments.safetensors")
    projected = run.recipe.directions.projection == "neutral"
    return fit_directions(
        moments["target"],
        moments["contrast"],
        remove_mean_of=moments.get("neutral", moments["contrast"]) if projected else None,
    )


def _bake_inputs(run: Run) -> Any:
    edit = run.recipe.edit.model_dump(mode="json", exclude={"output"})
    return [run.base_digest(), run.digest("directions"), edit, tuned_inputs(run)]


def _bake(run: Run) -> tuple[list[Path], Parts]:
    from abliterator.directions import load_subspace

    run.free()  # baking needs no model, and the files may be as large as the memory
    subspace = load_subspace(run.workspace.work / "directions.safetensors")
    out = run.workspace.checkpoint
    if out.exists():
        shutil.rmtree(out)  # what an earlier recipe left there is not part of this checkpoint
    with run.progress.bar("bake", run.plan.checkpoint.total_bytes) as advance:
        edits = bake(
            run.plan.checkpoint,
            planned_edits(run),
            subspace.basis,
            out,
            made_from=_made_from(run),
            on_bytes=advance,
        )
    report = out / "abliterator" / "edits.json"
    write_text_atomic(report, edits_json(edits))
    config = out / CONFIG_FILE  # left to the next stage
    return [path for path in out.rglob("*") if path.is_file() and path != config], {}


def _made_from(run: Run) -> dict[str, str]:
    return {"recipe_digest": run.recipe.digest}


def _config_inputs(run: Run) -> Any:
    return [run.digest("bake"), _made_from(run)]


def _config(run: Run) -> tuple[list[Path], Parts]:
    write_config(run.plan.checkpoint, run.workspace.checkpoint, _made_from(run))
    return [run.workspace.checkpoint / CONFIG_FILE], {}


def _adapter_inputs(run: Run) -> Any:
    return [run.digest("bake"), run.digest("directions"), run.base_id, run.plan.source.revision]


def _adapter(run: Run) -> tuple[list[Path], Parts]:
    from abliterator.directions import load_subspace

    written = write_adapter(
        run.plan.checkpoint,
        planned_edits(run),
        load_subspace(run.workspace.work / "directions.safetensors").basis,
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
    text = (run.workspace.checkpoint / "abliterator" / "edits.json").read_text()
    return [TensorEdit.model_validate(edit) for edit in json.loads(text)]


PROMPTS = Stage("prompts", 2, _prompts_inputs, _prompts)
CAPTURE = Stage("capture", 1, _capture_inputs, _capture)
DIRECTIONS = Stage("directions", 2, _directions_inputs, _directions)
BAKE = Stage("bake", 2, _bake_inputs, _bake)
# Apart from the weights: it names the whole recipe, and another judge must not bake them again.
CONFIG = Stage("config", 1, _config_inputs, _config)
ADAPTER = Stage("adapter", 1, _adapter_inputs, _adapter)
