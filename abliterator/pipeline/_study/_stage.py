"""The stages of the studies: none is part of a build or changes its results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from abliterator.errors import RecipeError
from abliterator.files import write_text_atomic
from abliterator.pipeline._judges import choosing_judge
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Artefact, Stage
from abliterator.pipeline._study._controls import controls
from abliterator.pipeline._study._estimators import estimators
from abliterator.pipeline._study._measure import alpha, confirmation, extraction, pairs
from abliterator.pipeline._study._settings import Measured, StudySettings
from abliterator.pipeline.stages.capture import CAPTURE
from abliterator.pipeline.stages.prompts import PROMPTS
from abliterator.pipeline.stages.selection import (
    SELECTION,
    ranked_places,
    selected_layers,
    selection_of,
)
from abliterator.pipeline.stages.tuning import TUNING, tuned_inputs
from abliterator.recipe import Recipe
from abliterator.record import Study

_MEASURES: dict[str, Callable[[Run, StudySettings], Measured]] = {
    "extraction": extraction,
    "pairs": pairs,
    "alpha": alpha,
    "confirmation": confirmation,
    "controls": controls,
    "estimators": estimators,
}
STUDIES = tuple(_MEASURES)
USES_DIRECTIONS = ("alpha", "confirmation", "controls")  # captured by a stage
USES_TUNING = ("controls", "estimators")  # directions as they are baked


def study_stage(run: Run, name: str, settings: StudySettings) -> Stage:
    """The stage of one study.

    Raises:
        RecipeError: for layers that the model does not have, an edit without a run-time form, and
            a comparison of contrasts where the recipe has only one.
    """
    _require(run, name, settings)
    study = _MEASURES[name]
    return Stage(
        f"study-{name}",
        1,
        partial(_key, name, settings),
        partial(_run, study, settings),
        asks_model=True,
    )


def figures_of(name: str) -> Artefact:
    """The file of a study's figures; its tables are beside it as .md."""
    return Artefact(f"study-{name}", f"work/studies/{name}.json")


def stages_before(name: str, recipe: Recipe) -> list[Stage]:
    """The stages that a study needs."""
    tunes = name in USES_TUNING and recipe.tunes
    chooses = recipe.selects and name in (*USES_DIRECTIONS, *USES_TUNING)
    stages = [PROMPTS]
    if name in USES_DIRECTIONS or chooses or tunes:
        stages.append(CAPTURE)
    return [*stages, *([SELECTION] if chooses else []), *([TUNING] if tunes else [])]


def _require(run: Run, name: str, settings: StudySettings) -> None:
    n_layers = run.plan.anatomy.n_layers
    if beyond := [layer for layer in settings.layers or () if not 1 <= layer <= n_layers]:
        raise RecipeError(
            f"--layers names {', '.join(map(str, beyond))}, but the model has layers 1 to "
            f"{n_layers}."
        )
    if name not in ("extraction", "alpha") and run.recipe.edit.norm != "none":
        raise RecipeError(
            f"The study `{name}` tries edits at run time, and `edit.norm: {run.recipe.edit.norm}` "
            "has no run-time form. Ask with --set edit.norm=none."
        )
    without_one = {"per_layer": "has one for each block", "sequential": "removes none"}
    if name == "alpha" and (instead := without_one.get(run.recipe.directions.stack)):
        raise RecipeError(
            "The study `alpha` takes one subspace out of the whole stream, and "
            f"`directions.stack: {run.recipe.directions.stack}` {instead}. Ask with --set "
            "directions.stack=layers."
        )
    if name == "confirmation" and run.recipe.sweeps_nodes:
        raise RecipeError(
            "The study `confirmation` stacks the directions of several layers, and `directions."
            "stack: som` with `k: auto` has nodes of one. Ask with --set directions.stack=layers."
        )
    if name == "pairs" and run.recipe.prompts.contrast is None:
        raise RecipeError(
            "The study `pairs` compares two contrasts, and the recipe has one: its neutral "
            "prompts. Give `prompts.contrast`: prompts as like the target as possible that do not "
            "show the behaviour (`abliterator pairs` makes some)."
        )


def _key(name: str, settings: StudySettings, run: Run) -> Any:
    recipe = run.recipe
    sections = ["chat", "capture", "directions", "edit"]
    if name in USES_TUNING:
        sections.append("selection")  # how many are drawn, and judged on what
    return [
        name,
        asdict(settings),
        run.base_digest(),
        run.digest("prompts"),
        {section: run.section(section) for section in sections},
        [run.digest("capture"), *_layers(run)] if name in USES_DIRECTIONS else None,
        tuned_inputs(run) if name in USES_TUNING else None,
        [run.section("rollouts"), recipe.divergence.tokens, recipe.seed],
        choosing_judge(run).identity.model_dump(mode="json"),
        run.dtype,
        *run.answers_depend_on(candidates=True),
        *(_layers(run) if name == "estimators" else []),
    ]


def _layers(run: Run) -> list[Any]:
    """The layers in order of preference, and how many are stacked."""
    return [ranked_places(run, selection_of(run)), selected_layers(run).k]


def _run(
    measure: Callable[[Run, StudySettings], Measured], settings: StudySettings, run: Run
) -> list[Path]:
    """Runs a study and writes its figures and tables."""
    from abliterator.study import to_markdown

    study, details = measure(run, settings)
    about = {
        "model": run.base_id,
        **({"revision": run.plan.source.revision} if run.plan.source.revision else {}),
        "recipe": run.recipe.digest[:12],
        "computed in": run.dtype or "the stored dtype",
        **details,
    }
    study = study.model_copy(update={"about": about})
    figures = figures_of(study.name)
    table = figures.path(run).with_suffix(".md")
    write_text_atomic(table, to_markdown(study))
    return [figures.write(run, study), table, *_picture(run, study, table.with_suffix(".png"))]


def _picture(run: Run, study: Study, path: Path) -> list[Path]:
    """The front of compliance against KL, where edits were measured at several strengths."""
    from abliterator.plots import can_draw, draw_front

    if not study.compared_with:
        return []
    if not can_draw():
        run.progress.note("No picture: `pip install 'abliterator[plots]'` draws the front.")
        return []
    points: dict[str, list[tuple[float, float]]] = {}
    crosses: list[tuple[float, float]] = []
    for row in study.rows:
        compliance, kl = row.answers.compliance, row.divergence and row.divergence.kl
        if compliance and kl:
            of_row = points.setdefault(row.of, []) if row.of else crosses
            of_row.append((kl.value, compliance.value))
    base = study.rows[0].answers.compliance
    draw_front(path, points, controls=crosses, base=base.value if base else None)
    return [path]
