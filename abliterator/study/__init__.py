"""The studies behind a choice: how directions are extracted, from what, how many, how strongly.

Every study measures edits of one loaded model, as hooks, on the same prompts as the base: answers
by a judge, and the divergence along the base's own answers. The room does not know recipes or
files, nor how the layers that it is given were found.

    with Bench(subject, scratch) as bench:
        study_alpha(bench, subspace.basis, (0.0, 0.5, 1.0))
        study_confirmation(bench, directions, (16, 15, 17, 13, 9))

The questions are those of the replication whose layers the recipes carry.
"""

from abliterator.study._bench import Bench, Step
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
from abliterator.study._types import Agreement, Asked, Difference, Row, Study, Subject

__all__ = [
    "Agreement",
    "Asked",
    "Bench",
    "Contrast",
    "Difference",
    "Row",
    "Step",
    "Study",
    "Subject",
    "confirmation_edits",
    "study_alpha",
    "study_confirmation",
    "study_controls",
    "study_extraction",
    "study_pairs",
    "to_markdown",
]
