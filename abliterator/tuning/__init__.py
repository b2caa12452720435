"""Strengths and direction by gradients: what a sweep leaves to taste, found by descent.

Every writer gets a strength of its own, and the directions themselves may move, so that target
prompts are answered while neutral answers stay. The edit stays what it is everywhere else: one Q,
one strength a tensor, baked exactly. Gradients flow through the preview of the edit; the model's
weights never change. The room does not know recipes or files, nor the prompts on which the result
will be measured.

    found = tune(subject, start, Settings())
    chosen = found.settings[prefer(found.points, "product")]

After refusal direction optimisation (Wollschläger et al. 2025, arXiv 2502.17420), with a strength
for each writer as in heretic's profiles. Its score is another: avoiding the base's refusals is not
enough, since a model learns to avoid a word; the edited model must come to prefer an *answer* that
a judge accepted over the refusal. Between legs it is asked again: what it says now that is neither
a refusal nor an answer, a dodge, is learned against as well.
"""

from abliterator.tuning._front import Preference, prefer
from abliterator.tuning._tune import Tuned, tune
from abliterator.tuning._types import Asked, Point, Setting, Settings, Subject

__all__ = [
    "Asked",
    "Point",
    "Preference",
    "Setting",
    "Settings",
    "Subject",
    "Tuned",
    "prefer",
    "tune",
]
