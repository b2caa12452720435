"""A recipe becomes a measured checkpoint, stage by stage.

    recipe -> plan -> prompts -> capture -> (selection) -> (tuning) -> directions -> bake -> config
           -> (adapter) -> rollouts -> judge -> divergence -> benchmarks -> record -> card

`stages` has a file for each. This package alone reads a whole `Recipe`; it neither prints nor
parses arguments, and reports what it does to a `Progress`.

    record = build(load_recipe(Path("recipes/demo.yaml")), Path("out"))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from abliterator.costs import Machine, Setup
from abliterator.errors import AbliteratorError, PromptError
from abliterator.pipeline._answer_pairs import AnswerPair, answer_pairs
from abliterator.pipeline._bake_subspace import bake_subspace
from abliterator.pipeline._build_several import Build, build_on_workers
from abliterator.pipeline._chat_session import ChatSession, Turns, open_chat
from abliterator.pipeline._first_recipe import first_recipe
from abliterator.pipeline._judges import judge_of, note_plain_http, require_key
from abliterator.pipeline._local_judge import JudgeHost
from abliterator.pipeline._model import Model
from abliterator.pipeline._options import Options
from abliterator.pipeline._planning._estimate import Estimate, estimate
from abliterator.pipeline._planning._outlook import expected_seconds, with_outlook
from abliterator.pipeline._planning._plan import Plan, make_plan, plan_source
from abliterator.pipeline._planning._planned_prompts import planned_prompts
from abliterator.pipeline._planning._setup import engines_of
from abliterator.pipeline._progress import Advance, Progress, Silent
from abliterator.pipeline._report import write_report
from abliterator.pipeline._reproduce import Reproduction, compare_rebuilt
from abliterator.pipeline._resume import prepare, require_pinned_code, run_missing
from abliterator.pipeline._study import (
    STUDIES,
    StudySettings,
    figures_of,
    stages_before,
    study_stage,
)
from abliterator.pipeline._survival._command import SurvivalSettings, survive
from abliterator.pipeline._vllm import vllm_note, vllm_of
from abliterator.pipeline._workspace import Workspace, usable
from abliterator.pipeline.stages import STAGES, stages_of
from abliterator.pipeline.stages.capture import CAPTURE
from abliterator.pipeline.stages.directions import DIRECTIONS
from abliterator.pipeline.stages.judge import JUDGE
from abliterator.pipeline.stages.record import read_record
from abliterator.pipeline.stages.selection import SELECTION
from abliterator.pipeline.stages.tuning import TUNING
from abliterator.recipe import Edit, Recipe
from abliterator.record import RunRecord, Study
from abliterator.source import headers_folder

__all__ = [
    "STAGES",
    "STUDIES",
    "Advance",
    "AnswerPair",
    "Build",
    "ChatSession",
    "Estimate",
    "JudgeHost",
    "Model",
    "Options",
    "Plan",
    "Progress",
    "Reproduction",
    "Silent",
    "StudySettings",
    "SurvivalSettings",
    "Turns",
    "answer_pairs",
    "bake_subspace",
    "build",
    "build_several",
    "compare_rebuilt",
    "estimate_on",
    "expected_seconds",
    "first_recipe",
    "judge_of",
    "note_plain_http",
    "open_chat",
    "plan_model",
    "plan_recipe",
    "read_record",
    "recipe_of",
    "require_key",
    "run_stages",
    "run_study",
    "stages_of",
    "survive",
    "write_report",
]


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


def build_several(
    builds: Sequence[Build], *, options: Options | None = None, progress: Progress | None = None
) -> Iterator[RunRecord | AbliteratorError]:
    """The record of each build, in their order, or the error that ended it.

    One after the other, or side by side where the options name workers, one build a worker.

    Args:
        builds: in folders of their own.
        options: of every build.
        progress: notified of stages where builds run one after the other.

    Raises:
        WorkerError: if there is no room for the workers.
    """
    options = options or Options()
    if options.pool is not None:
        yield from build_on_workers(builds, options.pool, options, _build)
        return
    for recipe, out in builds:
        try:
            yield build(recipe, out, options=options, progress=progress)
        except AbliteratorError as error:
            yield error


def _build(recipe: Recipe, out: Path, options: Options) -> RunRecord:
    return build(recipe, out, options=options)


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
    stages = stages_of(recipe, until)
    choosing = [SELECTION, TUNING] if recipe.selection.judge == "recipe" else []
    judging = [stage for stage in (JUDGE, *choosing) if stage in stages]
    first = CAPTURE if recipe.selects or recipe.tunes else DIRECTIONS
    with usable(out):
        is_new = not out.exists()
        if any(Workspace(out).marker(stage.name) is None for stage in judging):
            require_key(recipe.judge)  # hours before it is needed
        run = prepare(recipe, out, options, progress)
    run_missing(run, recipe, stages, keep_from=first if is_new else None)


def run_study(
    name: str,
    recipe: Recipe,
    out: Path,
    settings: StudySettings | None = None,
    *,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Study:
    """Runs a study and the stages before it that are not done; writes it to work/studies.

    Args:
        name: one of `STUDIES`.
        recipe: the model, prompts and edit.
        out: output folder, also that of a build of the same recipe.
        settings: how much is measured.
        options: device, dtype, and whether to reuse the folder of another recipe.
        progress: notified of stages and of work done.

    Raises:
        AbliteratorError: for what cannot be studied.
    """
    with usable(out):
        is_new = not out.exists()
        run = prepare(recipe, out, options, progress)
        stage = study_stage(run, name, settings or StudySettings())
    before = stages_before(name, recipe)
    first = before[min(1, len(before) - 1)]
    run_missing(run, recipe, (*before, stage), keep_from=first if is_new else None)
    return figures_of(name).read_as(run, Study)


def recipe_of(out: Path) -> Recipe:
    """The resolved recipe of a folder that `build` made.

    Raises:
        OutputError: if the folder is not ours.
    """
    return Workspace(out).recipe()


def plan_recipe(
    recipe: Recipe, out: Path, *, options: Options | None = None, measure: bool = False
) -> Plan:
    """The plan of a recipe: its model opened, every tensor classified, what a build needs counted.

    Of a model that is on the Hub alone, no weights are downloaded, so none can be read through the
    plan's checkpoint. What the machine lacks (a prompt file, a key, disk space, a device) is in
    `missing`, all of it.

    Args:
        recipe: what is built.
        out: where it would be built.
        options: device, dtype and memory of computation.
        measure: measure this machine first, in a few seconds, for the estimate of time.

    Raises:
        AbliteratorError: for a model, an edit or layers that cannot be built.
    """
    require_pinned_code(recipe)
    with headers_folder(recipe.model, revision=recipe.revision) as source:
        plan = plan_source(source, recipe, out)
        plan = with_outlook(plan, recipe, out, options or Options(), measure=measure)
    if vllm := vllm_of(recipe, options.vllm_python if options else None):
        plan = replace(plan, notes=(*plan.notes, vllm_note(vllm)))
    return plan


def estimate_on(
    recipe: Recipe, out: Path, machine: Machine, *, setup: Setup | None = None
) -> Estimate:
    """The cost of a recipe's build on a machine with given rates, this one or another.

    Args:
        recipe: what is built.
        out: where it would be built.
        machine: its rates.
        setup: how the build uses it; unless given, a model in memory, one process, and a bake on
            one core, with the recipe's engines.

    Raises:
        AbliteratorError: for a model, an edit or layers that cannot be built.
        PromptError: for prompts that cannot be read.
    """
    with headers_folder(recipe.model, revision=recipe.revision) as source:
        plan = plan_source(source, recipe, out)
        prompts = planned_prompts(recipe, source.folder)
        if prompts.problems:
            raise PromptError(prompts.problems[0])
        return estimate(recipe, plan, prompts, machine, setup or engines_of(recipe))


def plan_model(
    model: str, out: Path, *, edit: Edit | None = None, options: Options | None = None
) -> Plan:
    """The plan of an edit of a model without a recipe, from headers alone.

    Without an `edit` it is `Edit()`, partial where the model can be edited in part only.

    Raises:
        AbliteratorError: for a model that cannot be edited.
    """
    with headers_folder(model, revision=None) as source:
        plan = make_plan(source, edit, out)
        return with_outlook(plan, None, out, options or Options())
