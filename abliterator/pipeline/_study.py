"""The stages of the studies: none is part of a build, and none changes what a build makes."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
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
from abliterator.pipeline.stages.capture import fitted
from abliterator.pipeline.stages.prompts import load_sets, prompt_sets
from abliterator.pipeline.stages.selection import extracted_subspace, selected_layers, selection_of
from abliterator.pipeline.stages.tuning import planned_edits, tuned_inputs, tuned_subspace
from abliterator.record import Study

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from abliterator.bake import EditPlan
    from abliterator.directions import Directions, Place
    from abliterator.engines import Engine
    from abliterator.evaluation import EditEvaluator, EvaluationContext, RenderedPrompts
    from abliterator.prompts import PromptSet
    from abliterator.study import Contrast

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


def study_stage(run: Run, name: str, asked: StudySettings) -> Stage:
    """The stage of one study.

    Raises:
        RecipeError: for layers that the model does not have, an edit without a run-time form, and
            a comparison of contrasts where the recipe has only one.
    """
    _require(run, name, asked)
    study = {
        "extraction": _extraction,
        "pairs": _pairs,
        "alpha": _alpha,
        "confirmation": _confirmation,
        "controls": _controls,
    }[name]
    return Stage(
        f"study-{name}", 1, partial(_key, name, asked), partial(_run, study, asked), asks_model=True
    )


def read_study(run: Run, name: str) -> Study:
    """What a study that is done found."""
    return _figures(name).read_as(run, Study)


def _figures(name: str) -> Artefact:
    """Where a study leaves its figures; its tables lie beside them as .md."""
    return Artefact(f"study-{name}", f"work/studies/{name}.json")


def _require(run: Run, name: str, asked: StudySettings) -> None:
    n_layers = run.plan.anatomy.n_layers
    if beyond := [layer for layer in asked.layers or () if not 1 <= layer <= n_layers]:
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
    if name == "pairs" and run.recipe.prompts.contrast is None:
        raise RecipeError(
            "The study `pairs` compares two contrasts, and the recipe has one: its neutral "
            "prompts. Give `prompts.contrast`: prompts as like the target as possible that do not "
            "show the behaviour (`abliterator pairs` makes some)."
        )


def _key(name: str, asked: StudySettings, run: Run) -> Any:
    recipe = run.recipe
    sections = ("chat", "capture", "directions", "edit")
    return [
        name,
        asdict(asked),
        run.base_digest(),
        run.digest("prompts"),
        {section: run.section(section) for section in sections},
        [run.digest("capture"), _places(run), selected_layers(run).k]
        if name in USES_DIRECTIONS
        else None,
        tuned_inputs(run) if name in USES_TUNING else None,
        [run.section("rollouts"), recipe.divergence.tokens, recipe.seed],
        choosing_judge(run).identity.model_dump(mode="json"),
        run.dtype,
    ]


def _directions_key(run: Run) -> Any:
    return [run.digest("capture"), _places(run), selected_layers(run).k]


def _run(
    study: Callable[[Run, StudySettings], Study], asked: StudySettings, run: Run
) -> list[Path]:
    """Runs a study and writes what it found."""
    from abliterator.study import to_markdown

    found = study(run, asked)
    about = {
        "model": run.base_id,
        **({"revision": run.plan.source.revision} if run.plan.source.revision else {}),
        "recipe": run.recipe.digest[:12],
        "computed in": run.dtype or "the stored dtype",
        **found.about,
    }
    found = found.model_copy(update={"about": about})
    figures = _figures(found.name)
    table = figures.path(run).with_suffix(".md")
    write_text_atomic(table, to_markdown(found))
    return [figures.write(run, found), table]


def _extraction(run: Run, asked: StudySettings) -> Study:
    from abliterator.study import study_extraction

    sets = prompt_sets(run).extraction
    engine = run.engine(run.plan.source.folder)
    prompts = {name: sets[name].prompts[: asked.limit] for name in ("target", "contrast")}
    with run.progress.bar("captured parts", 32) as advance:
        found = study_extraction(
            engine,
            *(run.render(engine, kept, name=name).token_ids for name, kept in prompts.items()),
            position=_position(run),
            max_batch_tokens=run.recipe.capture.max_batch_tokens,
            on_step=lambda what: advance(1, status=what),
        )
    return found.model_copy(update={"about": {"position": _position(run), **_counted(prompts)}})


def _pairs(run: Run, asked: StudySettings) -> Study:
    from abliterator.study import study_pairs

    # generic prompts are kept out of the measurement, whether or not a build needs any
    sets = load_sets(run.recipe.prompts, seed=run.recipe.seed, neutral_too=True)
    of: dict[Contrast, PromptSet] = {
        "paired": sets.extraction["contrast"],
        "generic": sets.extraction["neutral"],
    }
    few = min(len(s.prompts) for s in (sets.extraction["target"], *of.values()))
    target = sets.extraction["target"].prompts[:few]
    engine = run.engine(run.plan.source.folder)
    directions = {
        name: _directions(run, engine, target, contrast.prompts[:few])
        for name, contrast in of.items()
    }
    layers = asked.layers or tuple(range(1, run.plan.anatomy.n_layers + 1))
    measured = {name: s.prompts for name, s in sets.evaluation.items()}
    with _evaluator(run, asked, measured, edits=2 * len(layers)) as evaluator:
        found = study_pairs(evaluator, directions, layers)
    counts = {"position": _position(run), "prompts of each kind for directions": few}
    return found.model_copy(update={"about": {**counts, **_measured(evaluator)}})


def _alpha(run: Run, asked: StudySettings) -> Study:
    from abliterator.study import study_alpha

    sets = prompt_sets(run).evaluation
    measured = {name: s.prompts for name, s in sets.items()}
    with _evaluator(run, asked, measured, edits=len(asked.alphas)) as evaluator:
        found = study_alpha(evaluator, extracted_subspace(run).basis, asked.alphas)
    about = {
        "layers": list(selected_layers(run).layers),
        "k": selected_layers(run).k,
        **_measured(evaluator),
    }
    return found.model_copy(update={"about": about})


def _confirmation(run: Run, asked: StudySettings) -> Study:
    from abliterator.study import confirmation_edits, study_confirmation

    places = _places(run)
    measured = {name: s.prompts for name, s in prompt_sets(run).evaluation.items()}
    with _evaluator(run, asked, measured, edits=confirmation_edits(len(places))) as evaluator:
        found = study_confirmation(evaluator, fitted(run), places)
    return found.model_copy(update={"about": _measured(evaluator)})


def _controls(run: Run, asked: StudySettings) -> Study:
    from abliterator.study import study_controls

    found = selected_layers(run)
    basis = (tuned_subspace(run, found.layers) or extracted_subspace(run)).basis
    draws, shuffled = run.recipe.selection.controls, _shuffled(run)
    measured = {name: s.prompts for name, s in prompt_sets(run).evaluation.items()}
    edits = 1 + draws + len(shuffled)
    with _evaluator(run, asked, measured, edits=edits, plan=planned_edits(run)) as evaluator:
        study = study_controls(evaluator, basis, shuffled, draws=draws)
    about = {"layers": list(found.layers), "k": basis.shape[-1], **_measured(evaluator)}
    return study.model_copy(update={"about": about})


def _shuffled(run: Run) -> list[Tensor]:
    """Q of the same layers from shuffled labels: of halves that have as many prompts of each kind.

    None where directions are tuned, for no descent would follow those, and none within a layer.
    """
    from abliterator.directions import per_layer, stack

    settings, layers = run.recipe.directions, selected_layers(run).layers
    if settings.estimator == "tuned" or settings.stack == "within_layer":
        return []
    made = per_layer if settings.stack == "per_layer" else stack
    sets, engine = prompt_sets(run).extraction, run.engine(run.plan.source.folder)
    found = []
    for draw in range(run.recipe.selection.controls):
        halves: tuple[list[str], list[str]] = [], []
        for name in ("target", "contrast"):
            prompts = list(sets[name].prompts)
            random.Random(f"{run.recipe.seed} {name} {draw}").shuffle(prompts)
            halves[0].extend(prompts[::2])
            halves[1].extend(prompts[1::2])
        found.append(made(_directions(run, engine, *halves), layers).basis)
    return found


@contextmanager
def _evaluator(
    run: Run,
    asked: StudySettings,
    prompts: Mapping[str, Sequence[str]],
    *,
    edits: int,
    plan: EditPlan | None = None,
) -> Iterator[EditEvaluator]:
    """The evaluator of a study, with its bar; `prompts` are those of the evaluation."""
    from abliterator.evaluation import EditEvaluator

    scratch = run.workspace.work / "studies" / "base_logits.bin"
    scratch.parent.mkdir(parents=True, exist_ok=True)
    context = _context(run, asked, prompts, plan or run.plan.edits)
    with (
        run.progress.bar("edits measured", 1 + edits) as advance,
        EditEvaluator(context, scratch, lambda name: advance(1, status=name)) as evaluator,
    ):
        yield evaluator


def _context(
    run: Run, asked: StudySettings, prompts: Mapping[str, Sequence[str]], plan: EditPlan
) -> EvaluationContext:
    from abliterator.evaluation import EvaluationContext

    recipe, engine = run.recipe, run.engine(run.plan.source.folder)
    limit = asked.limit or recipe.rollouts.limit
    length = asked.tokens or recipe.rollouts.max_new_tokens

    def rendered(name: str, tokens: int) -> RenderedPrompts:
        return run.render(engine, prompts[name][:limit], name=name, max_new_tokens=tokens)

    return EvaluationContext(
        engine=engine,
        plan=plan,
        target=rendered("target", length),
        neutral=rendered("neutral", recipe.divergence.tokens),
        judge=choosing_judge(run),
        max_new_tokens=length,
        kl_tokens=recipe.divergence.tokens,
        batch_size=run.batch_size,
        max_batch_tokens=recipe.capture.max_batch_tokens,
        seed=recipe.seed,
    )


def _directions(
    run: Run, engine: Engine, target: Sequence[str], contrast: Sequence[str]
) -> Directions:
    from abliterator.capture import capture
    from abliterator.directions import fit_directions

    settings = run.recipe.capture
    moments = [
        capture(
            engine,
            run.render(engine, prompts, name=name).token_ids,
            position=_position(run),
            padding=settings.padding,
            max_batch_tokens=settings.max_batch_tokens,
        )
        for name, prompts in (("target", target), ("contrast", contrast))
    ]
    return fit_directions(*moments)


def _places(run: Run) -> list[Place]:
    """Layers and positions in order of preference: the selection's, or those of the recipe."""
    from abliterator.directions import Place

    found = selection_of(run)
    if found is not None:
        return list(map(Place, found.layers, found.positions))
    return [Place(layer, _position(run)) for layer in run.plan.layers]


def _position(run: Run) -> int:
    """The recipe's position; where it is swept, the last token."""
    position = run.recipe.directions.position
    return -1 if position == "sweep" else position


def _counted(prompts: Mapping[str, Sequence[str]]) -> dict[str, int]:
    return {f"{name} prompts": len(kept) for name, kept in prompts.items()}


def _measured(evaluator: EditEvaluator) -> dict[str, Any]:
    context = evaluator.context
    return {
        "judge": context.judge.identity.model or context.judge.identity.kind,
        "target prompts": len(context.target.prompts),
        "neutral prompts": len(context.neutral.prompts),
        "tokens of an answer": context.max_new_tokens,
        "tokens of KL": context.kl_tokens,
    }
