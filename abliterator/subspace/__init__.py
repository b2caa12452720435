"""Pure linear algebra on tensors: moments, orthonormal bases, and the edit of a weight.

Functions of tensors only, without files, models or choice of device. Weights are given as *panels*
[H, c]: H runs over the residual stream, the c columns over the matrix's inputs, so one formula
(`Removal`) serves every layout.

    basis = orthonormal_basis(directions)            # [k, H] -> Q [H, k]
    edited = ablate(panel, basis, strength=1.0)      # W' = W - s Q Qᵀ W

Shapes: N prompts, L layers, M modules that write, H = d_model, k and r ranks, c columns of a panel.
"""

from abliterator.subspace._bases import (
    DEPENDENT_BELOW,
    basis_of_block,
    cosine_matrix,
    orthonormal_basis,
    orthonormal_columns,
    random_basis,
)
from abliterator.subspace._compensate import Store, compensate, compensating_rows
from abliterator.subspace._edit import (
    Removal,
    ablate,
    column_ranges,
    in_turn,
    keep_column_norms,
    left_in_turn,
    removal_of_basis,
)
from abliterator.subspace._moments import Moments, MomentSet, merged, require_finite
from abliterator.subspace._pairs import (
    is_by_writer,
    lengths_of,
    pair_cosines,
    pair_distances,
    pairs_of_removals,
    with_lengths,
)

__all__ = [
    "DEPENDENT_BELOW",
    "MomentSet",
    "Moments",
    "Removal",
    "Store",
    "ablate",
    "basis_of_block",
    "column_ranges",
    "compensate",
    "compensating_rows",
    "cosine_matrix",
    "in_turn",
    "is_by_writer",
    "keep_column_norms",
    "left_in_turn",
    "lengths_of",
    "merged",
    "orthonormal_basis",
    "orthonormal_columns",
    "pair_cosines",
    "pair_distances",
    "pairs_of_removals",
    "random_basis",
    "removal_of_basis",
    "require_finite",
    "with_lengths",
]
