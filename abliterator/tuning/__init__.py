"""Strengths and directions of an edit, tuned by gradients.

Every writer gets a strength of its own, and the directions themselves may move, so that target
prompts are answered while neutral answers stay. The edit stays what it is everywhere else: one Q,
one strength a tensor, baked exactly. Gradients flow through the preview of the edit in
transformers' modules; the model's weights never change.

    tuned = tune(context, start, scratch=folder / "base_logits.bin")
    baked = tuned.edits[prefer(tuned.trials, "product")]

After refusal direction optimisation (Wollschläger et al. 2025, arXiv 2502.17420), with a strength
for each writer as in heretic's profiles. Its score is another: avoiding the base's refusals is not
enough, since a model learns to avoid single words; the edited model must come to prefer an *answer*
that a judge accepted over the refusal. Between phases the edited model answers again, and what the
judge rejects is trained against as well.
"""

from abliterator.tuning._trials import Preference, prefer
from abliterator.tuning._tune import Tuned, tune
from abliterator.tuning._types import TunedEdit, TuningContext

__all__ = ["Preference", "Tuned", "TunedEdit", "TuningContext", "prefer", "tune"]
