"""Tunes a start edit, and measures the tuned edits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from abliterator.evaluation import OnStep, RenderedPrompts
from abliterator.files import Journal
from abliterator.prompts import readable
from abliterator.recipe import Selection
from abliterator.record import Trial
from abliterator.tuning._descend import descend
from abliterator.tuning._kept import KeptSteps, dump_pairs, load_pairs
from abliterator.tuning._measure import Candidate, measure
from abliterator.tuning._pairs import base_answers, make_pairs, with_rejected
from abliterator.tuning._trials import with_front
from abliterator.tuning._types import PreferencePairs, TunedEdit, TuningContext


class Tuned(NamedTuple):
    """Tuned edits and their measurements on held-out prompts, in the same order.

    Attributes:
        edits: edits that can be baked.
        trials: their measurements; the first is the start edit, at the plan's strengths.
        preference_pairs: target prompts that were learned from.
    """

    edits: list[TunedEdit]
    trials: list[Trial]
    preference_pairs: int


def tune(
    context: TuningContext,
    basis: Tensor,
    settings: Selection | None = None,
    *,
    scratch: Path,
    journal: Journal | None = None,
    on_step: OnStep = lambda name: None,
) -> Tuned:
    """Tunes an edit from `basis`, and measures the results.

    Args:
        context: the model, which writers are edited, the prompts and the config.
        basis: Q [H, k] float64 of the start, orthonormal columns.
        settings: how trials are raced; the defaults of a recipe unless given.
        scratch: a file for the base's logits on held-out neutral prompts; it is deleted.
        journal: of an interrupted tuning with the same arguments: its finished steps are not done
            again, and those of this one are added.
        on_step: called with each step that is done.

    Raises:
        DirectionError: if there is too little to learn from, or the descent diverges.
    """
    kept = KeptSteps(journal)

    def first_pairs() -> Any:
        base = base_answers(context)
        pairs = make_pairs(base, basis)
        on_step(f"{len(pairs.target)} preference pairs")
        prompts = [readable(prompt) for prompt in base.context.target.prompts]
        return {"prompts": prompts, **dump_pairs(pairs)}

    first = kept.value("pairs", first_pairs)
    # with the base's thinking behind them, some prompts may be left out
    pairs, learned = load_pairs(first), replace(context, target=_texts(first["prompts"]))

    def ask_again(pairs: PreferencePairs, edit: TunedEdit) -> PreferencePairs:
        new_pairs, n_rejected = with_rejected(learned, pairs, edit)
        on_step(f"{n_rejected} rejected responses")
        return new_pairs

    results = descend(context, pairs, basis, on_step=on_step, ask_again=ask_again, kept=kept)
    start = TunedEdit(basis, {e.writer.module: e.strength for e in context.plan.edits})
    candidates = [Candidate(0.0, 1.0, start)]
    candidates += [
        Candidate(weight, scale, result.scaled(scale))
        for weight, result in zip(context.config.kl_weights, results, strict=True)
        for scale in context.config.scales
    ]
    trials = measure(
        context, candidates, settings or Selection(), scratch=scratch, kept=kept, on_step=on_step
    )
    edits = [candidate.edit for candidate in candidates]
    return Tuned(edits, with_front(trials), len(pairs.target))


def _texts(prompts: list[str]) -> RenderedPrompts:
    """Prompts as written; their token ids are in the preference pairs."""
    return RenderedPrompts(prompts, ())
