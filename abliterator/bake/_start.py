"""Pairs of every module that writes, from the subspace that they start at."""

from __future__ import annotations

from typing import TYPE_CHECKING

from abliterator.bake._plan import EditPlan, require_fit
from abliterator.bake._write import removal_of
from abliterator.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor


def start_pairs(plan: EditPlan, checkpoint: Checkpoint, basis: Tensor) -> Tensor:
    """Pairs [M, 2, H, r] with which every writer loses a subspace: U = V = Q where no gain follows.

    With them an edit is the one with `basis`, up to rounding.

    Args:
        plan: of the edit.
        checkpoint: the base.
        basis: Q [H, r], orthonormal.
    """
    from abliterator.subspace import pairs_of_removals

    require_fit(basis, plan)
    first = {plan.pair_of[writer.module]: writer for writer in reversed(plan.writers)}
    removals = [removal_of(first[i], checkpoint, basis, plan) for i in range(len(first))]
    return pairs_of_removals(removals)
