"""The stages, composed, resumed, recorded: one recipe becomes a measured checkpoint.

    recipe -> plan -> prompts -> capture -> (selection) -> (tuning) -> directions -> bake -> config
           -> (adapter) -> rollouts -> judge -> divergence -> benchmarks -> record -> card

Only this room reads a `Recipe` whole. It neither prints nor parses: it tells a `Progress` what it
does.

    record = build(load_recipe(Path("recipes/demo.yaml")), Path("out"))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from abliterator.errors import AbliteratorError, OutputError
from abliterator.pipeline._bake_subspace import bake_subspace
from abliterator.pipeline._chat_session import Talk, Turns, open_talk
from abliterator.pipeline._first_recipe import first_recipe
from abliterator.pipeline._plan import (
    Plan,
    make_plan,
    require_adapter,
    require_layers,
    require_room,
    selection_cost,
    tuning_cost,
)
from abliterator.pipeline._progress import Advance, Progress, Silent
from abliterator.pipeline._prompt_lengths import ASKING, require_readable
from abliterator.pipeline._reproduce import Reproduction, compare_rebuilt
from abliterator.pipeline._run import Options, Run, pinned, require_pinned_code, resolve
from abliterator.pipeline._stage import Stage
from abliterator.pipeline._study import (
    STUDIES,
    USES_DIRECTIONS,
    USES_TUNING,
    StudySettings,
    read_study,
    study_stage,
)
from abliterator.pipeline._workspace import Workspace, usable
from abliterator.pipeline.stages.bake import (
    ADAPTER,
    BAKE,
    CONFIG,
    DIRECTIONS,
    PROMPTS,
)
from abliterator.pipeline.stages.benchmarks import BENCHMARKS, benchmark_tasks, pin_tasks
from abliterator.pipeline.stages.capture import CAPTURE
from abliterator.pipeline.stages.card import CARD, RECORD, read_record
from abliterator.pipeline.stages.divergence import DIVERGENCE
from abliterator.pipeline.stages.judge import JUDGE, judge_of, note_plain_http, require_key
from abliterator.pipeline.stages.rollouts import ROLLOUTS
from abliterator.pipeline.stages.selection import SELECTION
from abliterator.pipeline.stages.tuning import TUNING
from abliterator.recipe import Edit, Recipe
from abliterator.record import RunRecord
from abliterator.source import ModelSource, headers_folder, resolve_folder

if TYPE_CHECKING:
    from abliterator.study import Study

__all__ = [
    "STAGES",
    "STUDIES",
    "Advance",
    "Options",
    "Plan",
    "Progress",
    "Reproduction",
    "Silent",
    "StudySettings",
    "Talk",
    "Turns",
    "bake_subspace",
    "build",
    "compare_rebuilt",
    "first_recipe",
    "judge_of",
    "note_plain_http",
    "open_talk",
    "plan_model",
    "plan_recipe",
    "read_record",
    "recipe_of",
    "require_key",
    "run_stages",
    "run_study",
]

STAGES = (
    PROMPTS,
    CAPTURE,
    SELECTION,  # only where a recipe leaves layers or k to it
    TUNING,  # only where it leaves strengths or directions to it
    DIRECTIONS,
    BAKE,
    CONFIG,
    ADAPTER,  # only where it asks for one
    ROLLOUTS,
    JUDGE,
    DIVERGENCE,
    BENCHMARKS,
    RECORD,
    CARD,
)


def build(
    recipe: Recipe, out: Path, *, options: Options | None = None, progress: Progress | None = None
) -> RunRecord:
    """Runs every stage that is not done, and returns the record of `out`/checkpoint.

    Raises:
        AbliteratorError: before anything is written if the recipe, the model or the folder do not
            fit together.
    """
    run_stages(recipe, out, until="card", options=options, progress=progress)
    return read_record(out)


def run_stages(
    recipe: Recipe,
    out: Path,
    *,
    until: str,
    options: Options | None = None,
    progress: Progress | None = None,
) -> None:
    """Runs the stages up to and with `until`, skipping those whose inputs have not changed.

    Raises:
        AbliteratorError: as `build`.
    """
    with usable(out):
        _run_stages(recipe, out, until, options or Options(), progress or Silent())


def _run_stages(
    recipe: Recipe, out: Path, until: str, options: Options, progress: Progress
) -> None:
    stages = STAGES[: [stage.name for stage in STAGES].index(until) + 1]
    asked = {SELECTION: recipe.selects, TUNING: recipe.tunes, ADAPTER: recipe.edit.adapts}
    stages = tuple(stage for stage in stages if asked.get(stage, True))
    is_new = not out.exists()
    choosing = [SELECTION, TUNING] if recipe.selection.judge == "recipe" else []
    judging = [stage for stage in (JUDGE, *choosing) if stage in stages]
    if any(Workspace(out).marker(stage.name) is None for stage in judging):
        require_key(recipe.judge)  # hours before it is needed
    run = prepare(recipe, out, options=options, progress=progress)
    first = CAPTURE if recipe.selects or recipe.tunes else DIRECTIONS
    _run_all(run, recipe, stages, keep_from=first if is_new else None)


def run_study(
    name: str,
    recipe: Recipe,
    out: Path,
    asked: StudySettings | None = None,
    *,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Study:
    """Runs a study and what it needs, unless that is done; its artefacts are in work/studies.

    Args:
        name: one of `STUDIES`.
        recipe: what model, prompts and edit.
        out: output folder, also that of a build of the same recipe.
        asked: how much is measured.
        options: where and how.
        progress: hears of stages.

    Raises:
        AbliteratorError: for what cannot be studied.
    """
    with usable(out):
        is_new = not out.exists()
        run = prepare(recipe, out, options=options or Options(), progress=progress or Silent())
        stage = study_stage(run, name, asked or StudySettings())
        before = [PROMPTS]
        if name in USES_DIRECTIONS:
            before += [CAPTURE, *([SELECTION] if recipe.selects else [])]
        if name in USES_TUNING and recipe.tunes:
            before.append(TUNING)
        _run_all(run, recipe, (*before, stage), keep_from=before[-1] if is_new else None)
        return read_study(run, name)


def _run_all(run: Run, recipe: Recipe, stages: Sequence[Stage], *, keep_from: Stage | None) -> None:
    """Runs stages in a folder; a new one that fails before `keep_from` is done is deleted."""
    with run.workspace.held():
        run.workspace.create(recipe, run.recipe)
        unread = True
        try:
            for stage in stages:
                if (
                    unread
                    and stage.name.startswith((*ASKING, "study-"))
                    and not _is_done(run, stage)
                ):
                    require_readable(run)
                    unread = False
                _run_stage(run, stage)
        except AbliteratorError:
            # nothing worth keeping was made yet: leave no folder behind that looks like a result
            if keep_from is not None and run.workspace.marker(keep_from.name) is None:
                run.workspace.remove()
            raise


def _is_done(run: Run, stage: Stage) -> bool:
    return run.workspace.is_done(stage.name, stage.key(run))


def _run_stage(run: Run, stage: Stage) -> None:
    key = stage.key(run)
    done = run.workspace.is_done(stage.name, key)
    run.progress.stage(stage.name, done=done)
    if done:
        return
    start = perf_counter()
    artefacts, parts = stage.run(run)
    if stage.key(run) != key:
        raise OutputError(
            f"What the stage `{stage.name}` depends on was changed while it ran: prompt files, for "
            "example. Give the same command again when they are at rest."
        )
    seconds = round(perf_counter() - start, 3)
    run.workspace.finish(stage.name, key, artefacts, seconds=seconds, parts=parts)


def prepare(recipe: Recipe, out: Path, *, options: Options, progress: Progress) -> Run:
    """Everything that can fail cheaply, before anything is written: the plan and its checks."""
    workspace = Workspace(out)
    resolved = workspace.claim(recipe, force=options.force)
    wanted = recipe if resolved is None else pinned(recipe, resolved)
    require_pinned_code(wanted)
    plan = _plan_in(resolve_folder(wanted.model, revision=wanted.revision), wanted, out)
    tasks = benchmark_tasks(wanted)
    judge_of(wanted.judge, cache=workspace.work)  # its calibration is read; nobody is asked yet
    if resolved is None:
        wanted = pin_tasks(resolve(recipe, plan.source.revision), tasks)
    return Run(wanted, plan, workspace, options, progress, tasks)


def recipe_of(out: Path) -> Recipe:
    """The resolved recipe of a folder that `build` made.

    Raises:
        OutputError: if the folder is not ours.
    """
    return Workspace(out).recipe()


def plan_recipe(recipe: Recipe, out: Path) -> Plan:
    """The plan of a recipe: its model opened, every tensor classified, layers and disk checked.

    Of a model that is on the Hub alone, no weights are downloaded, so none can be read through the
    plan's checkpoint.

    Raises:
        AbliteratorError: for whatever would stop the build before its first stage.
    """
    require_pinned_code(recipe)
    with headers_folder(recipe.model, revision=recipe.revision) as source:
        return _plan_in(source, recipe, out)


def _plan_in(source: ModelSource, recipe: Recipe, out: Path) -> Plan:
    plan = make_plan(source, recipe.edit, out)
    layers, k = require_layers(recipe, plan.anatomy)
    require_adapter(recipe, plan)
    require_room(plan, out)
    return replace(
        plan,
        layers=layers,
        k=k,
        selection=selection_cost(recipe, len(layers)),
        tuning=tuning_cost(recipe),
    )


def plan_model(model: str, out: Path, *, edit: Edit | None = None) -> Plan:
    """The plan of an edit, the default one unless given, of a model without a recipe.

    Like `plan_recipe`, of headers alone.
    """
    with headers_folder(model, revision=None) as source:
        return make_plan(source, edit or Edit(), out)
