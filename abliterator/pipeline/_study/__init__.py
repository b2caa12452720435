"""Studies as stages: none is part of a build or changes its results."""

from abliterator.pipeline._study._settings import StudySettings
from abliterator.pipeline._study._stage import (
    STUDIES,
    USES_DIRECTIONS,
    USES_TUNING,
    figures_of,
    study_stage,
)

__all__ = [
    "STUDIES",
    "USES_DIRECTIONS",
    "USES_TUNING",
    "StudySettings",
    "figures_of",
    "study_stage",
]
