"""Directions removed one after another, beside their removal together."""

from __future__ import annotations

import torch
from torch import Tensor


def sequential_removal(directions: Tensor) -> tuple[Tensor, Tensor]:
    """A, B [H, k] float64 with (I - r_k r_kᵀ) ... (I - r_1 r_1ᵀ) = I - A Bᵀ, r_i unit directions.

    What tools do that ablate several directions one by one. The product is one matrix M, so it
    bakes into a writer as W' = M W and is a rank-k edit (the compact WY form, Bischof and Van Loan
    1987). But only where the directions are orthogonal is it the removal of their span: elsewhere M
    is no projection, its result depends on the order, and of all directions only the last is gone
    for certain (r_kᵀ M = 0); removing r_k brings some of the earlier ones back. `stack_at` removes
    the span.

    Args:
        directions: [k, H], in the order in which they are removed; any lengths but 0.
    """
    units = torch.nn.functional.normalize(directions.double(), dim=1)
    left, right = units[:1].T, units[:1].T
    for unit in units[1:, :, None]:
        # (I - r rᵀ)(I - A Bᵀ) = I - A Bᵀ + r (rᵀA) Bᵀ - r rᵀ = I - [A, r] [B, r - B (Aᵀ r)]ᵀ
        right = torch.cat([right, unit - right @ (left.T @ unit)], dim=1)
        left = torch.cat([left, unit], dim=1)
    return left, right


def left_behind(directions: Tensor) -> Tensor:
    """Of each unit direction r_i, |r_iᵀ M|: what sequential removal M leaves of it, [k] float64.

    0 for all where they are orthogonal, and always for the last; removal of the span leaves 0.
    """
    units = torch.nn.functional.normalize(directions.double(), dim=1)
    left, right = sequential_removal(directions)
    remaining: Tensor = (units - (units @ left) @ right.T).norm(dim=1)
    return remaining
