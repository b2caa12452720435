"""Studies as stages: none is part of a build or changes its results."""

from abliterator.pipeline._study._settings import StudySettings
from abliterator.pipeline._study._stage import (
    STUDIES,
    figures_of,
    stages_before,
    study_stage,
)

__all__ = [
    "STUDIES",
    "StudySettings",
    "figures_of",
    "stages_before",
    "study_stage",
]
