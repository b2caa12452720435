"""What a comparison found; JSON both ways."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from abliterator.record import Behaviour, BenchmarkResult, Divergence, Frozen, JudgeIdentity

Verdict = Literal[
    "identical", "rounding", "directional", "directional_by_block", "low_rank", "full_rank", "other"
]


class TensorDelta(Frozen):
    """One tensor that differs; None is what cannot be told."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    norm: float | None = None  # Frobenius norm of edited - base
    relative: float | None = None  # over that of base
    rank: int | None = None  # above the noise of rounding; None for more than can be told
    side: Literal["output", "input"] | None = None  # where directions are removed, if they are
    strength: float | None = None  # of that removal: 1 removes, 2 mirrors


class WeightDiff(Frozen):
    """All that differs between two checkpoints' weights.

    `verdict` is "directional" where every matrix that differs removes the same `rank` directions on
    its output side, "directional_by_block" where blocks have directions of their own, "low_rank"
    where all deltas have a small rank but are no such removal (a LoRA, say), "full_rank" where some
    delta has none (a fine-tune, noise), "rounding" where nothing differs by more than the stored
    dtype rounds, "other" for tensors that do not correspond.
    """

    compared: int
    identical: int
    only_base: tuple[str, ...]
    only_edited: tuple[str, ...]
    deltas: tuple[TensorDelta, ...]
    verdict: Verdict
    rank: int | None


class Comparison(Frozen):
    """Two checkpoints side by side; what was not asked for is None or empty."""

    base: str
    edited: str
    weights: WeightDiff
    behaviour: dict[str, Behaviour] = Field(default_factory=dict)
    judge: JudgeIdentity | None = None
    divergence: Divergence | None = None
    benchmarks: dict[str, BenchmarkResult] = Field(default_factory=dict)
