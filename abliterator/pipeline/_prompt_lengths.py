"""Every prompt of a recipe against the context of its model, before weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from abliterator.pipeline._run import Run
from abliterator.pipeline.stages.prompts import PromptSets, prompt_sets


class _Use(NamedTuple):
    """Some prompts, and the tokens of an answer that follow them."""

    name: str
    prompts: Sequence[str]
    max_new_tokens: int


def require_prompts_fit(run: Run) -> None:
    """Stops at a prompt that the model cannot read, whichever stage would have come to it.

    Raises:
        PromptError: for a prompt that is too long, with or without its answer.
        CheckpointError: for tokens that the model has no embedding of.
    """
    from abliterator.model import load_tokenizer, render_prompts, stored_limits

    folder, trusted = run.plan.source.folder, run.recipe.trust_remote_code
    limits = stored_limits(folder, trust_remote_code=trusted)
    tokenizer = load_tokenizer(folder, trust_remote_code=trusted)
    chat = run.recipe.chat.model_dump(include={"system", "template_kwargs"})
    for name, prompts, max_new_tokens in _uses(run, prompt_sets(run)):
        render_prompts(tokenizer, prompts, limits, name=name, max_new_tokens=max_new_tokens, **chat)


def _uses(run: Run, sets: PromptSets) -> Iterator[_Use]:
    recipe = run.recipe
    judged = recipe.selection.tokens if recipe.selects or recipe.tunes else 0
    for name, used in sets.extraction.items():
        yield _Use(name, used.prompts, judged)
    for name, used in sets.selection.items():
        yield _Use(f"selection {name}", used.prompts, judged)
    for name, used in sets.evaluation.items():
        limit, length = recipe.rollouts.limit, recipe.rollouts.max_new_tokens
        yield _Use(f"evaluation {name}", used.prompts[:limit], length)
    compared = sets.evaluation["neutral"].prompts[: recipe.divergence.limit]
    yield _Use("evaluation neutral", compared, recipe.divergence.tokens)
