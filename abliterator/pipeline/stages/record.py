"""The record of all that was measured, which the card and other tools read.

The stage writes record.json, the recipe and pictures to the checkpoint.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from statistics import mean, median
from typing import Any

from abliterator.errors import OutputError
from abliterator.files import copy_file, read_text, sha256_of_file, write_text_atomic
from abliterator.pipeline._planning._quantization import quantized_edits
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Artefact, Stage
from abliterator.pipeline._summaries import (
    behaviour_of,
    benchmark_results,
    confidence_of,
    groupings_of,
    sampled_answers,
    side_effects_of,
)
from abliterator.pipeline._survival._results import survived
from abliterator.pipeline.stages.bake import tensor_edits
from abliterator.pipeline.stages.capture import MOMENTS
from abliterator.pipeline.stages.directions import SUBSPACE, direction_checks
from abliterator.pipeline.stages.divergence import DIVERGENCE_JSON
from abliterator.pipeline.stages.judge import IDENTITY, VERDICTS
from abliterator.pipeline.stages.prompts import prompt_sets, uses
from abliterator.pipeline.stages.rollouts import engines_of
from abliterator.pipeline.stages.selection import selected_layers, selection_of
from abliterator.pipeline.stages.tuning import planned_edits, tuning_record
from abliterator.prompts import NEAR_DUPLICATE, NEAR_WORDS, Conversation, PromptSet
from abliterator.recipe import ranges_of
from abliterator.record import (
    Divergence,
    EditSummary,
    JudgeIdentity,
    ModelIdentity,
    PromptOrigin,
    Provenance,
    RunRecord,
    TensorEdit,
    Tool,
    Verdict,
)
from abliterator.verification import BASE_CARD, CARD, DIRECTIONS, PICTURES, RECIPE, recipe_text
from abliterator.verification import RECORD as RECORD_FILE

_GATING = re.compile("extra_gated_")
PACKAGES = (
    *("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub"),
    *("datasets", "lm_eval", "numpy"),
)


RECORD_JSON = Artefact("record", f"checkpoint/{RECORD_FILE}")

MEASURED = (
    *("prompts", "capture", "directions", "bake"),
    *("rollouts", "judge", "divergence", "benchmarks"),
)


def _measured(run: Run) -> list[str]:
    """Stages whose results and times are in the record."""
    recipe = run.recipe
    optional = {"selection": recipe.selects, "tuning": recipe.tunes, "adapter": recipe.edit.adapts}
    return [*MEASURED, *(name for name, applies in optional.items() if applies)]


def _key(run: Run) -> Any:
    base = run.plan.source.folder
    card = sha256_of_file(base / CARD) if (base / CARD).is_file() else None
    key = [
        {name: run.digest(name) for name in _measured(run)},
        run.recipe.published(),
        [run.base_digest(), card, stated(run.plan.card)],
    ]
    quantised = [survival.model_dump(mode="json") for survival in survived(run)]
    return [*key, quantised] if quantised else key


def _run(run: Run) -> list[Path]:
    out = run.workspace.checkpoint
    markers = {name: run.workspace.marker(name) for name in _measured(run)}
    timing = {name: marker.seconds for name, marker in markers.items() if marker is not None}
    pictures = _pictures(run)
    hashes = {name: sha256_of_file(path) for name, path in pictures.items()}
    directions = out / DIRECTIONS
    write_directions(run, directions)
    record = assemble(run, timing, hashes)
    recipe = out / RECIPE
    write_text_atomic(recipe, recipe_text(record))
    return [RECORD_JSON.write(run, record), recipe, directions, *pictures.values()]


def write_directions(run: Run, path: Path) -> None:
    """Writes the removed subspace with its sites, for other programs and at run time."""
    from safetensors.torch import load_file

    from abliterator.bake import runtime_obstacle, runtime_sites
    from abliterator.directions import save_published
    from abliterator.subspace import is_by_writer

    stored, selected, anatomy = (
        load_file(SUBSPACE.checked(run)),
        selected_layers(run),
        run.plan.anatomy,
    )
    plan = planned_edits(run)
    sites, of_sites = runtime_sites(plan, run.plan.checkpoint, stored["subspace"])
    source = run.plan.source
    # pairs (U, V) are those of the sites, by module
    shared = {} if is_by_writer(stored["subspace"]) else {"subspace": stored["subspace"]}
    save_published(
        path,
        tensors={**shared, "directions": stored["directions"].float(), **of_sites},
        sites=sites,
        metadata={
            "base_model": run.base_id,
            "base_revision": source.revision or "",
            "model_type": anatomy.model_type,
            "recipe_digest": run.recipe.digest,
            "n_layers": str(anatomy.n_layers),
            "d_model": str(anatomy.d_model),
            "blocks": anatomy.blocks,
            **({"streams": "several"} if anatomy.sublayers else {}),
            "layers": json.dumps(selected.layers),
            "positions": json.dumps(selected.positions),
            "estimator": run.recipe.directions.estimator,
            "k": str(selected.k),
        },
        obstacle=runtime_obstacle(plan),
    )


def _pictures(run: Run) -> dict[str, Path]:
    """The selection's pictures, copied beside the record; those of an earlier run are removed."""
    marker = run.workspace.marker("selection") if run.recipe.selects else None
    plots = (
        {Path(path).name: run.workspace.out / path for path in marker.artefacts} if marker else {}
    )
    copied = {}
    for name in PICTURES:
        source, path = plots.get(Path(name).name), run.workspace.checkpoint / name
        if source is None:
            path.unlink(missing_ok=True)
        else:
            copy_file(source, path)
            copied[name] = path
    return copied


def assemble(run: Run, timing: dict[str, float], pictures: dict[str, str]) -> RunRecord:
    """The record of a run whose every stage but card is done.

    Args:
        run: the run.
        timing: seconds of each stage.
        pictures: sha256 of each picture of the card, by its path in the checkpoint.
    """
    verdicts = VERDICTS.read_lines(run, Verdict)
    return RunRecord(
        tool=Tool(version=version("abliterator")),
        recipe=run.recipe.published(),
        recipe_digest=run.recipe.digest,
        model=_model(run),
        edit=_edit(run),
        behaviour=behaviour_of(run, verdicts),
        sampled=sampled_answers(run),
        groups=groupings_of(run, verdicts),
        side_effects=side_effects_of(run),
        confidence=confidence_of(run),
        engines={str(side): engine for side, engine in engines_of(run).items()},
        divergence=DIVERGENCE_JSON.read_as(run, Divergence),
        benchmarks=benchmark_results(run),
        judge=IDENTITY.read_as(run, JudgeIdentity),
        selection=selection_of(run),
        directions=direction_checks(run),
        tuning=tuning_record(run),
        timing=timing,
        survival=survived(run),
        pictures=pictures,
        files={DIRECTIONS: sha256_of_file(run.workspace.checkpoint / DIRECTIONS)},
        provenance=_provenance(run),
    )


def _model(run: Run) -> ModelIdentity:
    source, anatomy = run.plan.source, run.plan.anatomy
    return ModelIdentity(
        id=run.base_id,
        revision=source.revision,
        n_layers=anatomy.n_layers,
        d_model=anatomy.d_model,
        model_type=anatomy.model_type,
        several_streams=bool(anatomy.sublayers),
        **stated(run.plan.card),
        files_sha256=run.base_files(),
    )


def stated(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What the front matter of the base's own card states: licence, languages, gating."""
    names = ("license", "license_name", "license_link")
    fields: dict[str, Any] = {
        name: metadata[name] for name in names if isinstance(metadata.get(name), str)
    }
    fields["gating"] = {key: metadata[key] for key in metadata if _GATING.match(key)}
    languages = metadata.get("language")
    languages = [languages] if isinstance(languages, str) else languages
    if isinstance(languages, list):
        fields["languages"] = tuple(code for code in languages if isinstance(code, str))
    return fields


def _edit(run: Run) -> EditSummary:
    edits, selected = tensor_edits(run), selected_layers(run)
    leaks = [edit.leak for edit in edits if edit.leak is not None]
    settings = run.plan.edits.settings
    written = (*run.plan.checkpoint.weight_files, *run.plan.carried)
    return EditSummary(
        layers=selected.layers,
        positions=selected.positions,
        k=selected.k,
        strength=_strengths(run, edits),
        components=tuple(sorted({edit.component for edit in edits})),
        norm=settings.norm,
        rounding=settings.rounding,
        tensors=len(edits),
        max_leak=max(leaks, default=None),
        median_leak=median(leaks) if leaks else None,
        output_bytes=sum((run.workspace.checkpoint / name).stat().st_size for name in written),
        edited_bytes=planned_edits(run).edited_bytes,
        quantized=quantized_edits(edits),
        experts=None if run.recipe.edit.experts == "all" else run.recipe.edit.experts,
        partial=run.plan.anatomy.partial,
    )


def _strengths(run: Run, edits: Sequence[TensorEdit]) -> dict[str, float | dict[str, float]]:
    """Strength of each edited component, by blocks where they differ; the mean of tuned ones."""
    strengths: dict[str, float | dict[str, float]] = {}
    for component in dict.fromkeys(edit.component for edit in edits):
        own = [edit for edit in edits if edit.component == component]
        writers = (w for w in run.plan.edits.writers if w.component == component)
        by_block = dict.fromkeys((w.layer for w in writers), 0.0)
        by_block |= {edit.layer: edit.strength for edit in own}
        if run.recipe.edit.strength == "auto":  # one for each writer: edits.json has them all
            strengths[component] = round(mean(edit.strength for edit in own), 4)
        elif len(set(by_block.values())) == 1:
            strengths[component] = own[0].strength
        else:
            strengths[component] = ranges_of(by_block)
    return strengths


def _provenance(run: Run) -> Provenance:
    sets = prompt_sets(run)
    return Provenance(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        packages={name: number for name in PACKAGES if (number := _installed(name))},
        device=run.device,
        dtype=run.dtype or "as stored",
        hardware=run.hardware,
        digests=_digests(run),
        git_commit=_tool_commit(),
        prompts=tuple(prompt_origin(name, prompts) for name, prompts in uses(sets)),
        dropped_overlap=sum(s.overlap for s in sets.extraction.values()),
        near_duplicate=NEAR_DUPLICATE,
        near_words=NEAR_WORDS,
    )


def prompt_origin(name: str, prompts: PromptSet) -> PromptOrigin:
    """The origin of a prompt set; `name` is its kind and use."""
    names = PromptOrigin.model_fields.keys() - {"name", "n", "conversations"}
    fields = {field: getattr(prompts, field) for field in names}
    conversations = sum(isinstance(prompt, Conversation) for prompt in prompts.prompts)
    return PromptOrigin(name=name, n=len(prompts.prompts), conversations=conversations, **fields)


def _digests(run: Run) -> dict[str, str]:
    files = {
        "moments": MOMENTS.checked(run),
        "directions": SUBSPACE.checked(run),
    }
    card = run.plan.source.folder / CARD
    if card.is_file():
        files[BASE_CARD] = card  # the licence that it states is that of the record
    return {name: sha256_of_file(path) for name, path in files.items()}


def _tool_commit() -> str | None:
    """Commit of an abliterator that pip installed from a Git repository (PEP 610); else None."""
    origin = json.loads(distribution("abliterator").read_text("direct_url.json") or "{}")
    commit: str | None = origin.get("vcs_info", {}).get("commit_id")
    return commit


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def read_record(out: Path) -> RunRecord:
    """The record of an output folder.

    Raises:
        OutputError: if there is none yet, or it is damaged.
    """
    path = out / RECORD_JSON.name
    if not path.is_file():
        raise OutputError(f"{out} has no record yet; `abliterator build` makes it.")
    try:
        return RunRecord.model_validate_json(read_text(path))
    except ValueError as error:
        raise OutputError(
            f"{path} is not a record that this version of abliterator reads. Give the same "
            "`abliterator build` again: it makes the file anew."
        ) from error


RECORD = Stage("record", 5, _key, _run)
