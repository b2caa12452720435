"""Studies of the choices in a recipe: extraction, contrast, number of directions, strength.

Every study measures edits of one loaded model, as hooks, on the same prompts as the base: judged
answers, and the divergence along the base's answers. This package reads no recipe and no file, and
does not choose layers.

    with EditEvaluator(context, scratch) as evaluator:
        study_alpha(evaluator, subspace.basis, (0.0, 0.5, 1.0))
        study_confirmation(evaluator, directions, (16, 15, 17, 13, 9))

The questions are those of the replication whose layers the recipes carry.
"""

from abliterator.study._edits import (
    Contrast,
    confirmation_edits,
    study_alpha,
    study_confirmation,
    study_controls,
    study_pairs,
)
from abliterator.study._extraction import study_extraction
from abliterator.study._markdown import to_markdown

__all__ = [
    "Contrast",
    "confirmation_edits",
    "study_alpha",
    "study_confirmation",
    "study_controls",
    "study_extraction",
    "study_pairs",
    "to_markdown",
]
