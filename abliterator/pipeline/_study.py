"""The stages of the studies: none is part of a build or changes its results."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterator.errors import RecipeError
from abliterator.files import write_text_atomic
from abliterator.pipeline._judges import choosing_judge
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Artefact, Stage
from abliterator.pipeline.stages.capture import fitted, position_of
from abliterator.pipeline.stages.prompts import PromptSets, load_sets, prompt_sets
from abliterator.pipeline.stages.selection import (
    extracted_subspace,
    ranked_places,
    selected_layers,
    selection_of,
)
from abliterator.pipeline.stages.tuning import planned_edits, tuned_inputs, tuned_subspace
from abliterator.record import Study

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from abliterator.bake import EditPlan
    from abliterator.directions import Directions
    from abliterator.engines import Engine
    from abliterator.evaluation import EditEvaluator, RenderedPrompts
    from abliterator.prompts import Prompt, PromptSet
    from abliterator.study import Contrast

_Measured = tuple[Study, dict[str, Any]]  # a study, and what its tables are headed by

STUDIES = ("extraction", "pairs", "alpha", "confirmation", "controls")
USES_DIRECTIONS = ("alpha", "confirmation", "controls")  # those of the recipe's own contrast
USES_TUNING = ("controls",)  # directions and strengths as they are baked


@dataclass(frozen=True)
class StudySettings:
    """How much a study measures.

    Attributes:
        limit: prompts of each set; None for the recipe's `rollouts.limit`.
        tokens: of a judged answer; None for the recipe's `rollouts.max_new_tokens`.
        layers: those that `pairs` compares; None for all.
        alphas: those that `alpha` tries.
    """

    limit: int | None = None
    tokens: int | None = None
    layers: tuple[int, ...] | None = None
    alphas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def study_stage(run: Run, name: str, settings: StudySettings) -> Stage:
    """The stage of one study.

    Raises:
        RecipeError: for layers that the model does not have, an edit without a run-time form, and
            a comparison of contrasts where the recipe has only one.
    """
    _require(run, name, settings)
    study = {
        "extraction": _extraction,
        "pairs": _pairs,
        "alpha": _alpha,
        "confirmation": _confirmation,
        "controls": _controls,
    }[name]
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


def _require(run: Run, name: str, settings: StudySettings) -> None:
    n_layers = run.plan.anatomy.n_layers
    if beyond := [layer for layer in settings.layers or () if not 1 <= layer <= n_layers]:
        raise RecipeError(
            f"--layers names {', '.join(map(str, beyond))}, but the model has layers 1 to "
            f"{n_layers}."
        )
    if name in ("pairs", "confirmation", "controls") and run.recipe.edit.norm != "none":
        raise RecipeError(
            f"The study `{name}` tries edits at run time, and `edit.norm: {run.recipe.edit.norm}` "
            "has no run-time form. Ask with --set edit.norm=none."
        )
    if name == "alpha" and run.recipe.directions.stack == "per_layer":
        raise RecipeError(
            "The study `alpha` takes one subspace out of the whole stream, and "
            "`directions.stack: per_layer` has one for each block. Ask with --set "
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
    sections = ("chat", "capture", "directions", "edit")
    return [
        name,
        asdict(settings),
        run.base_digest(),
        run.digest("prompts"),
        {section: run.section(section) for section in sections},
        [run.digest("capture"), ranked_places(run, selection_of(run)), selected_layers(run).k]
        if name in USES_DIRECTIONS
        else None,
        tuned_inputs(run) if name in USES_TUNING else None,
        [run.section("rollouts"), recipe.divergence.tokens, recipe.seed],
        choosing_judge(run).identity.model_dump(mode="json"),
        run.dtype,
        *run.answers_depend_on(candidates=True),
    ]


def _run(
    measure: Callable[[Run, StudySettings], _Measured], settings: StudySettings, run: Run
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
    return [figures.write(run, study), table]


def _template_position(run: Run) -> int:
    """The recipe's position; where it is swept, the last token.

    Raises:
        RecipeError: for a named one.
    """
    position = position_of(run)
    if isinstance(position, str):
        raise RecipeError(
            f"A study takes directions at a token of the chat template; `directions.position` is "
            f"{position}. Set it to -1."
        )
    return position


def _extraction(run: Run, settings: StudySettings) -> _Measured:
    from abliterator.study import study_extraction

    sets = prompt_sets(run).extraction
    engine = run.engine(run.plan.source.folder)
    prompts = {name: sets[name].prompts[: settings.limit] for name in ("target", "contrast")}
    with run.progress.bar("captured parts", 32) as advance:
        study = study_extraction(
            engine,
            *(run.render(engine, texts, name=name).token_ids for name, texts in prompts.items()),
            position=_template_position(run),
            max_batch_tokens=run.recipe.capture.max_batch_tokens,
            on_step=lambda step: advance(1, status=step),
        )
    counts = {f"{name} prompts": len(texts) for name, texts in prompts.items()}
    return study, {"position": _template_position(run), **counts}


def _pairs(run: Run, settings: StudySettings) -> _Measured:
    from abliterator.study import study_pairs

    # generic prompts are not measured on, whether or not a build extracts from any
    sets = load_sets(run.recipe.prompts, seed=run.recipe.seed, neutral_too=True)
    contrasts: dict[Contrast, PromptSet] = {
        "paired": sets.extraction["contrast"],
        "generic": sets.extraction["neutral"],
    }
    n = min(len(s.prompts) for s in (sets.extraction["target"], *contrasts.values()))
    target = sets.extraction["target"].prompts[:n]
    engine = run.engine(run.plan.source.folder)
    directions = {
        name: _directions(run, engine, target, contrast.prompts[:n])
        for name, contrast in contrasts.items()
    }
    layers = settings.layers or tuple(range(1, run.plan.anatomy.n_layers + 1))
    with _evaluator(run, settings, sets, edits=2 * len(layers)) as evaluator:
        study = study_pairs(evaluator, directions, layers)
    counts = {"position": _template_position(run), "prompts of each kind for directions": n}
    return study, {**counts, **_described(evaluator)}


def _alpha(run: Run, settings: StudySettings) -> _Measured:
    from abliterator.study import study_alpha

    selected, sets = selected_layers(run), prompt_sets(run)
    with _evaluator(run, settings, sets, edits=len(settings.alphas)) as evaluator:
        study = study_alpha(evaluator, extracted_subspace(run).basis, settings.alphas)
    return study, {"layers": selected.layers, "k": selected.k, **_described(evaluator)}


def _confirmation(run: Run, settings: StudySettings) -> _Measured:
    from abliterator.directions import Place
    from abliterator.study import confirmation_edits, study_confirmation

    places = [Place(p.layer, p.position) for p in ranked_places(run, selection_of(run))]
    sets = prompt_sets(run)
    with _evaluator(run, settings, sets, edits=confirmation_edits(len(places))) as evaluator:
        study = study_confirmation(evaluator, fitted(run), places)
    return study, _described(evaluator)


def _controls(run: Run, settings: StudySettings) -> _Measured:
    from abliterator.study import study_controls

    selected = selected_layers(run)
    basis = (tuned_subspace(run, selected.layers) or extracted_subspace(run)).basis
    draws, shuffled = run.recipe.selection.controls, _shuffled(run)
    edits, sets = 1 + draws + len(shuffled), prompt_sets(run)
    with _evaluator(run, settings, sets, edits=edits, plan=planned_edits(run)) as evaluator:
        study = study_controls(evaluator, basis, shuffled, draws=draws)
    return study, {"layers": selected.layers, "k": basis.shape[-1], **_described(evaluator)}


def _shuffled(run: Run) -> list[Tensor]:
    """Q of the same layers from shuffled labels: of halves that have as many prompts of each kind.

    None where directions are tuned or estimated otherwise, since these would not be, and none
    within a layer.
    """
    from abliterator.directions import per_layer, stack

    settings, layers = run.recipe.directions, selected_layers(run).layers
    if settings.estimator != "mean_difference" or settings.of_one_layer:
        return []
    make_subspace = per_layer if settings.stack == "per_layer" else stack
    sets, engine = prompt_sets(run).extraction, run.engine(run.plan.source.folder)
    bases = []
    for draw in range(run.recipe.selection.controls):
        halves: tuple[list[Prompt], list[Prompt]] = [], []
        for name in ("target", "contrast"):
            prompts = list(sets[name].prompts)
            random.Random(f"{run.recipe.seed} {name} {draw}").shuffle(prompts)
            halves[0].extend(prompts[::2])
            halves[1].extend(prompts[1::2])
        bases.append(make_subspace(_directions(run, engine, *halves), layers).basis)
    return bases


@contextmanager
def _evaluator(
    run: Run,
    settings: StudySettings,
    sets: PromptSets,
    *,
    edits: int,
    plan: EditPlan | None = None,
) -> Iterator[EditEvaluator]:
    """The evaluator of a study on the evaluation prompts, with its bar."""
    from abliterator.evaluation import EditEvaluator, EvaluationContext

    recipe = run.recipe
    engine = run.answering(run.plan.source.folder, candidates=True)
    length = settings.tokens or recipe.rollouts.max_new_tokens

    def rendered(name: str, tokens: int) -> RenderedPrompts:
        prompts = sets.evaluation[name].prompts[: settings.limit or recipe.rollouts.limit]
        return run.render(engine, prompts, name=name, max_new_tokens=tokens)

    context = EvaluationContext(
        engine=engine,
        plan=plan or run.plan.edits,
        target=rendered("target", length),
        neutral=rendered("neutral", recipe.divergence.tokens),
        judge=choosing_judge(run),
        max_new_tokens=length,
        kl_tokens=recipe.divergence.tokens,
        batch_size=run.batch_size,
        max_batch_tokens=recipe.capture.max_batch_tokens,
        seed=recipe.seed,
    )
    scratch = run.workspace.work / "studies" / "base_logits.bin"
    scratch.parent.mkdir(parents=True, exist_ok=True)
    with (
        run.progress.bar("edits measured", 1 + edits) as advance,
        EditEvaluator(context, scratch, lambda name: advance(1, status=name)) as evaluator,
    ):
        yield evaluator


def _directions(
    run: Run, engine: Engine, target: Sequence[Prompt], contrast: Sequence[Prompt]
) -> Directions:
    from abliterator.capture import capture
    from abliterator.directions import fit_directions

    settings = run.recipe.capture
    moments = [
        capture(
            engine,
            run.render(engine, prompts, name=name).token_ids,
            position=_template_position(run),
            padding=settings.padding,
            max_batch_tokens=settings.max_batch_tokens,
        )
        for name, prompts in (("target", target), ("contrast", contrast))
    ]
    return fit_directions(*moments)


def _described(evaluator: EditEvaluator) -> dict[str, str | int]:
    context = evaluator.context
    return {
        "judge": context.judge.identity.model or context.judge.identity.kind,
        "target prompts": len(context.target.prompts),
        "neutral prompts": len(context.neutral.prompts),
        "tokens of an answer": context.max_new_tokens,
        "tokens of KL": context.kl_tokens,
    }
