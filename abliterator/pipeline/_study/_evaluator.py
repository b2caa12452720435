"""The evaluator of a study, and directions from prompts of its own choice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from abliterator.errors import RecipeError
from abliterator.pipeline._judges import choosing_judge
from abliterator.pipeline._run import Run
from abliterator.pipeline._study._settings import StudySettings
from abliterator.pipeline.stages.capture import position_of
from abliterator.pipeline.stages.prompts import PromptSets

if TYPE_CHECKING:
    from abliterator.bake import EditPlan
    from abliterator.directions import Directions
    from abliterator.engines import Engine
    from abliterator.evaluation import EditEvaluator, RenderedPrompts
    from abliterator.prompts import Prompt


def template_position(run: Run) -> int:
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


@contextmanager
def evaluator_of(
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


def fitted_directions(
    run: Run, engine: Engine, target: Sequence[Prompt], contrast: Sequence[Prompt]
) -> Directions:
    """The mean differences of two prompt sets at the recipe's position."""
    from abliterator.capture import capture
    from abliterator.directions import fit_directions

    settings = run.recipe.capture
    moments = [
        capture(
            engine,
            run.render(engine, prompts, name=name).token_ids,
            position=template_position(run),
            padding=settings.padding,
            max_batch_tokens=settings.max_batch_tokens,
            share_prefix=settings.share_prefix,
        )
        for name, prompts in (("target", target), ("contrast", contrast))
    ]
    return fit_directions(*moments)


def described(evaluator: EditEvaluator) -> dict[str, str | int]:
    """The judge, and how much was measured, for the head of a study's tables."""
    context = evaluator.context
    return {
        "judge": context.judge.identity.model or context.judge.identity.kind,
        "target prompts": len(context.target.prompts),
        "neutral prompts": len(context.neutral.prompts),
        "tokens of an answer": context.max_new_tokens,
        "tokens of KL": context.kl_tokens,
    }
