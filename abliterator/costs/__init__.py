"""What a build costs on a machine: seconds, memory, disk and tokens, stage by stage.

From the sizes of a model (`shape_of`, from headers alone), rates of a machine (`calibrate` measures
them in a few seconds, `assumed` has those of accelerators that are not here) and counts of the work
that a recipe asks for. What a recipe is, is not known here.

    work = Work(shape_of(checkpoint, anatomy), calibrate("cpu", "float32"))
    Costs(work).capture([[40] * 128], max_tokens=4096).seconds
"""

from abliterator.costs._cache import known_machine, remember
from abliterator.costs._calibrate import calibrate
from abliterator.costs._machine import ACCELERATORS, Assumed, Machine, assumed
from abliterator.costs._passes import Work, spread
from abliterator.costs._rows import DEFAULT_ROWS, rows_that_fit
from abliterator.costs._shape import Matrix, ModelShape, dtype_bytes, shape_of
from abliterator.costs._stages import Costs
from abliterator.costs._types import Answerer, Answers, Batch, Benchmark, Setup, StageCost

__all__ = [
    "ACCELERATORS",
    "DEFAULT_ROWS",
    "Answerer",
    "Answers",
    "Assumed",
    "Batch",
    "Benchmark",
    "Costs",
    "Machine",
    "Matrix",
    "ModelShape",
    "Setup",
    "StageCost",
    "Work",
    "assumed",
    "calibrate",
    "dtype_bytes",
    "known_machine",
    "remember",
    "rows_that_fit",
    "shape_of",
    "spread",
]
