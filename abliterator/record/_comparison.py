"""Results of a comparison of two checkpoints."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from abliterator.record._measured import (
    Behaviour,
    BenchmarkResult,
    Divergence,
    Estimate,
    Frozen,
)
from abliterator.record._run import EngineIdentity, JudgeIdentity

WeightVerdict = Literal[
    "identical",
    "config",
    "rounding",
    "directional",
    "directional_by_block",
    "low_rank",
    "full_rank",
    "other",
]
Part = Literal["chat_template", "tokenizer", "stop_tokens", "generation_config", "config", "code"]
Asking = Literal["alike", "as_base", "apart"]
Measurement = Literal["behaviour", "divergence", "benchmarks"]


class Difference(Frozen):
    """One difference beside the weights that changes prompts, answers or computation."""

    part: Part
    name: str  # the template's, the config's field, what of the tokenizer
    base: str | None  # as text of one line, an excerpt of a long one; None where it is not there
    edited: str | None


class TensorDelta(Frozen):
    """One tensor that differs; None where a value cannot be determined."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    norm: float | None = None  # Frobenius norm of edited - base
    relative: float | None = None  # over that of base
    rank: int | None = None  # above the noise of rounding; None for more than can be determined
    side: Literal["output", "input"] | None = None  # where directions are removed, if they are
    strength: float | None = None  # of that removal: 1 removes, 2 mirrors


class WeightDiff(Frozen):
    """All that differs between two checkpoints' weights.

    `verdict` is "directional" where every matrix that differs removes the same `rank` directions on
    its output side, "directional_by_block" where blocks have directions of their own, "low_rank"
    where all deltas have a small rank but are no such removal (a LoRA, say), "full_rank" where some
    delta has none (a fine-tune, noise), "rounding" where nothing differs by more than the stored
    dtype rounds, "other" for tensors that do not correspond. "config" is no difference of a tensor
    between models whose configs have them compute differently; "identical" has neither.
    """

    compared: int
    identical: int
    only_base: tuple[str, ...]
    only_edited: tuple[str, ...]
    deltas: tuple[TensorDelta, ...]
    verdict: WeightVerdict
    rank: int | None


class OwnScores(Frozen):
    """Unpaired scores of a benchmark task whose prompts differ between the sides."""

    metric: str
    base: Estimate
    edited: Estimate


class Comparison(Frozen):
    """A comparison of two checkpoints; what was not measured is None or empty.

    `asked` is "alike" where template, tokenizer, stop tokens and generation settings are the same;
    "as_base" where they are not, and both sides were asked with the base's, so that the weights and
    the config alone differ; "apart" where the vocabularies do not allow that: each side was asked
    in its own way, and nothing is paired. `withheld` says why a measurement has no difference
    between the sides.
    """

    base: str
    edited: str
    beside: tuple[Difference, ...] = ()
    asked: Asking = "alike"
    withheld: dict[Measurement, str] = Field(default_factory=dict)
    weights: WeightDiff
    behaviour: dict[str, Behaviour] = Field(default_factory=dict)
    engines: dict[str, EngineIdentity] = Field(default_factory=dict)  # by side, of servers
    judge: JudgeIdentity | None = None
    divergence: Divergence | None = None
    benchmarks: dict[str, BenchmarkResult] = Field(default_factory=dict)
    benchmarks_apart: dict[str, OwnScores] = Field(default_factory=dict)
