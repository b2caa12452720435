"""Checks every prompt of a recipe against its model's context, before weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from abliterator.pipeline._run import Run
from abliterator.pipeline.stages.prompts import PromptSets, prompt_sets
from abliterator.prompts import Prompt, turns_of

if TYPE_CHECKING:
    from abliterator.benchmarks.conversation import Skill


def require_prompts_fit(run: Run) -> None:
    """Checks that the model can read every prompt of every stage.

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


def _uses(run: Run, sets: PromptSets) -> Iterator[tuple[str, Sequence[Prompt], int]]:
    """The name of each set, its prompts, and the length of an answer at most.

    Of conversations with scripted turns, the answers to all turns are one answer here.
    """
    recipe = run.recipe
    answer_tokens = recipe.selection.tokens if recipe.selects or recipe.tunes else 0
    for name, prompts in sets.extraction.items():
        yield name, prompts.prompts, answer_tokens
    for name, prompts in sets.selection.items():
        yield f"selection {name}", prompts.prompts, answer_tokens
    for name, prompts in sets.evaluation.items():
        limit, max_new_tokens = recipe.rollouts.limit, recipe.rollouts.most_tokens
        yield f"evaluation {name}", prompts.prompts[:limit], max_new_tokens
        scripted = [prompt for prompt in prompts.prompts[:limit] if turns_of(prompt) > 1]
        for prompt in scripted:
            answers = max_new_tokens * turns_of(prompt)
            yield f"evaluation {name}, with scripted turns", [prompt], answers
    divergence_prompts = sets.evaluation["neutral"].prompts[: recipe.divergence.limit]
    yield "evaluation neutral", divergence_prompts, recipe.divergence.tokens
    for task in run.tasks:
        if task.skill is not None:
            yield from _conversations(task.name, task.skill)


def _conversations(name: str, skill: Skill) -> Iterator[tuple[str, Sequence[Prompt], int]]:
    """The conversations of a skill of the suite, with room for their answers."""
    from abliterator.benchmarks.conversation import items_of, max_new_tokens

    for item in items_of(skill):
        yield name, [item.described], max_new_tokens(skill) * turns_of(item.prompt)
