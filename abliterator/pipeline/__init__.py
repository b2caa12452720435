"""A recipe becomes a measured checkpoint, stage by stage.

    recipe -> plan -> prompts -> capture -> (selection) -> (tuning) -> directions -> bake -> config
           -> (adapter) -> rollouts -> judge -> divergence -> benchmarks -> record -> card

`stages` has a file for each. This package alone reads a whole `Recipe`; it neither prints nor
parses arguments, and reports what it does to a `Progress`.

    record = build(load_recipe(Path("recipes/demo.yaml")), Path("out"))
"""

from __future__ import annotations

from pathlib import Path

from abliterator.pipeline._answer_pairs import AnswerPair, answer_pairs
from abliterator.pipeline._bake_subspace import bake_subspace
from abliterator.pipeline._chat_session import ChatSession, Turns, open_chat
from abliterator.pipeline._first_recipe import first_recipe
from abliterator.pipeline._judges import judge_of, note_plain_http, require_key
from abliterator.pipeline._plan import Plan, plan_model, plan_source
from abliterator.pipeline._progress import Advance, Progress, Silent
from abliterator.pipeline._reproduce import Reproduction, compare_rebuilt
from abliterator.pipeline._resume import prepare, require_pinned_code, run_missing
from abliterator.pipeline._run import Options
from abliterator.pipeline._study import (
    STUDIES,
    USES_DIRECTIONS,
    USES_TUNING,
    StudySettings,
    figures_of,
    study_stage,
)
from abliterator.pipeline._workspace import Workspace, usable
from abliterator.pipeline.stages import STAGES, stages_of
from abliterator.pipeline.stages.capture import CAPTURE
from abliterator.pipeline.stages.directions import DIRECTIONS
from abliterator.pipeline.stages.judge import JUDGE
from abliterator.pipeline.stages.prompts import PROMPTS
from abliterator.pipeline.stages.record import read_record
from abliterator.pipeline.stages.selection import SELECTION
from abliterator.pipeline.stages.tuning import TUNING
from abliterator.recipe import Recipe
from abliterator.record import RunRecord, Study
from abliterator.source import headers_folder

__all__ = [
    "STAGES",
    "STUDIES",
    "Advance",
    "AnswerPair",
    "ChatSession",
    "Options",
    "Plan",
    "Progress",
    "Reproduction",
    "Silent",
    "StudySettings",
    "Turns",
    "answer_pairs",
    "bake_subspace",
    "build",
    "compare_rebuilt",
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
    before = [PROMPTS]
    if name in USES_DIRECTIONS:
        before += [CAPTURE, *([SELECTION] if recipe.selects else [])]
    if name in USES_TUNING and recipe.tunes:
        before.append(TUNING)
    first = before[min(1, len(before) - 1)]
    run_missing(run, recipe, (*before, stage), keep_from=first if is_new else None)
    return figures_of(name).read_as(run, Study)


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
        return plan_source(source, recipe, out)
