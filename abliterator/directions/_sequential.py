"""Directions removed one after another, beside their removal together."""

from __future__ import annotations

import torch
from torch import Tensor

from abliterator.subspace import Removal, in_turn, left_in_turn, removal_of_basis


def sequential_removal(directions: Tensor) -> tuple[Tensor, Tensor]:
    """A, B [H, k] float64 with (I - r_k r_kᵀ) ... (I - r_1 r_1ᵀ) = I - A Bᵀ, r_i unit directions.

    What tools do that ablate several directions one by one. The product is one matrix M, so it
    bakes into a writer as W' = M W and is a rank-k edit (`subspace.in_turn`). But only where the
    directions are orthogonal is it the removal of their span: elsewhere M is no projection, its
    result depends on the order, and of all directions only the last is gone for certain (r_kᵀ M =
    0); removing r_k brings some of the earlier ones back. `stack_at` removes the span.

    Args:
        directions: [k, H], in the order in which they are removed; any lengths but 0.
    """
    removal = in_turn(_removals(directions))
    return removal.take, removal.read


def left_behind(directions: Tensor) -> Tensor:
    """Of each unit direction r_i, |r_iᵀ M|: what sequential removal M leaves of it, [k] float64.

    0 for all where they are orthogonal, and always for the last; removal of the span leaves 0.
    """
    return left_in_turn(_removals(directions))


def _removals(directions: Tensor) -> list[Removal]:
    units = torch.nn.functional.normalize(directions.double(), dim=1)
    return [removal_of_basis(unit) for unit in units[:, :, None]]
