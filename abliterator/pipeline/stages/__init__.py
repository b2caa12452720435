"""The stages of a build, one file each, named after the stage.

A file has what the stage depends on (its key), its work, the files that it writes, and how later
stages read them. It imports only the files of stages that run before its own.
"""

from abliterator.pipeline._stage import Stage
from abliterator.pipeline.stages.adapter import ADAPTER
from abliterator.pipeline.stages.bake import BAKE
from abliterator.pipeline.stages.benchmarks import BENCHMARKS
from abliterator.pipeline.stages.capture import CAPTURE
from abliterator.pipeline.stages.card import CARD
from abliterator.pipeline.stages.config import CONFIG
from abliterator.pipeline.stages.directions import DIRECTIONS
from abliterator.pipeline.stages.divergence import DIVERGENCE
from abliterator.pipeline.stages.judge import JUDGE
from abliterator.pipeline.stages.prompts import PROMPTS
from abliterator.pipeline.stages.record import RECORD
from abliterator.pipeline.stages.rollouts import ROLLOUTS
from abliterator.pipeline.stages.selection import SELECTION
from abliterator.pipeline.stages.tuning import TUNING
from abliterator.recipe import Recipe

__all__ = ["STAGES", "stages_of"]

STAGES = (
    PROMPTS,
    CAPTURE,
    SELECTION,  # only where a recipe leaves layers or k to it
    TUNING,  # only where it leaves strengths or directions to it
    DIRECTIONS,
    BAKE,
    CONFIG,
    ADAPTER,  # only where it asks for one
    ROLLOUTS,
    JUDGE,
    DIVERGENCE,
    BENCHMARKS,
    RECORD,
    CARD,
)


def stages_of(recipe: Recipe, until: str = "card") -> tuple[Stage, ...]:
    """The stages that a recipe has, up to and with one of them."""
    last = [stage.name for stage in STAGES].index(until)
    optional = {SELECTION: recipe.selects, TUNING: recipe.tunes, ADAPTER: recipe.edit.adapts}
    return tuple(stage for stage in STAGES[: last + 1] if optional.get(stage, True))
