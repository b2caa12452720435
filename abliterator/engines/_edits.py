"""Run-time edits as data: removals and additions in the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from abliterator.bake import EditPlan

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class WriterEdit:
    """The baked edit at run time: h <- h - s Q Qᵀ h on the output of every planned writer.

    Attributes:
        plan: which matrices that write the residual stream are edited, and how strongly.
        basis: Q [H, k] with orthonormal columns, or [L, H, k] with one a block.
        strengths: s by module path, instead of the plan's.
    """

    plan: EditPlan
    basis: Tensor
    strengths: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StreamEdit:
    """Removal from the residual stream after every block: h <- h - alpha Q Qᵀ h.

    No edit of weights equals it: what the embeddings and other blocks wrote is removed too. Where
    blocks hold several streams, it is removed from each of them.

    Attributes:
        basis: Q [H, k] with orthonormal columns.
        alpha: 1 removes; 0 leaves every bit.
    """

    basis: Tensor
    alpha: float


@dataclass(frozen=True)
class Steering:
    """A direction added to the residual stream at one layer, at every token: h <- h + r.

    Where blocks hold several streams, it is added to each of them.

    Attributes:
        layer: 1 .. n_layers; layer l is the output of block l - 1.
        direction: r [H], as it is.
    """

    layer: int
    direction: Tensor


Edit: TypeAlias = WriterEdit | StreamEdit | Steering
