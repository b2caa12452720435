"""Pairs of every module that writes, from a subspace or from directions removed in turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from abliterator.bake._plan import EditPlan, require_fit
from abliterator.bake._write import removal_of
from abliterator.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from abliterator.subspace import Removal


def start_pairs(plan: EditPlan, checkpoint: Checkpoint, basis: Tensor) -> Tensor:
    """Pairs [M, 2, H, r] with which every writer loses a subspace: U = V = Q where no gain follows.

    With them an edit is the one with `basis`, up to rounding.

    Args:
        plan: of the edit.
        checkpoint: the base.
        basis: Q [H, r], orthonormal.
    """
    from abliterator.subspace import pairs_of_removals

    return pairs_of_removals(_removals(plan, checkpoint, basis))


def sequential_pairs(
    plan: EditPlan, checkpoint: Checkpoint, directions: Tensor
) -> tuple[Tensor, Tensor]:
    """Pairs [M, 2, H, k] with which every writer loses directions one after the other.

    Where gains follow a writer, each removal in turn is that of the direction through them. Where
    none do, U Vᵀ is A Bᵀ of `directions.sequential_removal`.

    Args:
        plan: of the edit.
        checkpoint: the base.
        directions: [k, H], in the order in which they are removed; any lengths but 0.

    Returns:
        The pairs, and what strength 1 leaves of each direction in the writer that keeps most of it,
        [k] float64 (`subspace.left_in_turn`).
    """
    import torch

    from abliterator.subspace import in_turn, left_in_turn, pairs_of_removals

    units = torch.nn.functional.normalize(directions.double(), dim=1)
    by_direction = [_removals(plan, checkpoint, unit[:, None]) for unit in units]
    by_writer = list(zip(*by_direction, strict=True))
    left = torch.stack([left_in_turn(removals) for removals in by_writer])
    return pairs_of_removals([in_turn(removals) for removals in by_writer]), left.amax(dim=0)


def _removals(plan: EditPlan, checkpoint: Checkpoint, basis: Tensor) -> list[Removal]:
    """The removal of Q [H, r] from what each of the M modules writes."""
    require_fit(basis, plan)
    first = {plan.pair_of[writer.module]: writer for writer in reversed(plan.writers)}
    return [removal_of(first[i], checkpoint, basis, plan) for i in range(len(first))]
