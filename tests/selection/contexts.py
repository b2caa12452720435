"""A tiny model as a selection measures it, asked one list of prompts throughout."""

from abliterator.anatomy import anatomy_of
from abliterator.bake import plan_edits
from abliterator.checkpoint import Checkpoint
from abliterator.engines import TransformersEngine
from abliterator.evaluation import EvaluationContext, RenderedPrompts
from abliterator.judge import RuleJudge
from abliterator.recipe import Edit
from abliterator.selection import KL_TOKENS, ScoringPrompts
from tests.engines import seams


def context_of(loaded, prompts, *, max_new_tokens, max_batch_tokens) -> EvaluationContext:
    checkpoint = Checkpoint.open(loaded.folder)
    rendered = RenderedPrompts([f"prompt {i}" for i in range(len(prompts))], prompts)
    return EvaluationContext(
        engine=TransformersEngine(loaded),
        plan=plan_edits(checkpoint, anatomy_of(checkpoint.config), Edit()),
        target=rendered,
        neutral=rendered,
        judge=RuleJudge(),
        max_new_tokens=max_new_tokens,
        kl_tokens=KL_TOKENS,
        batch_size=4,
        max_batch_tokens=max_batch_tokens,
    )


def scoring_of(context) -> ScoringPrompts:
    """The same prompts again: those by which candidates are scored."""
    return ScoringPrompts(context.target, context.target)


def removed(context, bases):
    """The edits that remove each of `bases`, side by side."""
    edits = [context.writer_edit(basis) for basis in bases]
    return context.engine.edited_side_by_side(edits, max_batch_tokens=context.max_batch_tokens)


def unedited(context):
    """The model as it is, with whatever hooks are on it, asked as an edit is."""
    return seams.unedited(context.engine.loaded, context.max_batch_tokens)
