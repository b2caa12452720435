"""Studies of a recipe's choices: extraction, contrast, directions, strength, controls, estimators.

Every study measures edits of one loaded model, as hooks, on the same prompts as the base: judged
answers, and the divergence along the base's answers. This package reads no recipe and no file, and
does not choose layers.

    with EditEvaluator(context, scratch) as evaluator:
        study_alpha(evaluator, subspace.basis, (0.0, 0.5, 1.0))
        study_confirmation(evaluator, directions, (16, 15, 17, 13, 9))

The first five questions are those of the replication whose layers the recipes carry.
"""

from abliterator.study._controls import TOGETHER, TOLERANCE, random_like, study_controls
from abliterator.study._edits import (
    confirmation_edits,
    study_alpha,
    study_confirmation,
    study_pairs,
)
from abliterator.study._estimators import EstimatedEdit, study_estimators
from abliterator.study._extraction import study_extraction
from abliterator.study._markdown import to_markdown
from abliterator.study._rows import Contrast

__all__ = [
    "TOGETHER",
    "TOLERANCE",
    "Contrast",
    "EstimatedEdit",
    "confirmation_edits",
    "random_like",
    "study_alpha",
    "study_confirmation",
    "study_controls",
    "study_estimators",
    "study_extraction",
    "study_pairs",
    "to_markdown",
]
