"""The edit of a checkpoint: planned, previewed at run time, written into files or an adapter.

`bake` edits files, not a model in memory: untouched byte ranges are streamed, and each writer (a
matrix that adds to the residual stream) is read, edited in column panels, and written at its old
place. How directions were determined is outside this package. The formula is `subspace.Removal`'s.

    plan = plan_edits(checkpoint, anatomy, recipe.edit)
    with preview_edit(loaded, plan, basis): ...          # the same edit without writing weights
    edits = bake(checkpoint, plan, basis, Path("out/checkpoint"))
    write_adapter(checkpoint, plan, basis, Path("out/adapter"), base_model="me/base")

H = d_model, k rank, Q [H, k] the orthonormal basis; every parameter `basis` also accepts one for
each block [L, H, k], L = n_layers: Q[i] is removed from what block i writes. With pairs (U, V) of
each module that writes, [M, 2, H, r] in the order of `EditPlan.pair_of`, the edit is
W' = W - s U Vᵀ W, and removes no subspace; `start_pairs` makes those of a Q, and
`sequential_pairs` those that remove directions one after the other.
"""

from abliterator.bake._adapter import (
    adapter_obstacle,
    require_adapter_form,
    write_adapter,
    write_adapters,
)
from abliterator.bake._plan import EditPlan, PlannedEdit, plan_edits, require_fit
from abliterator.bake._preview import preview_edit, preview_edits
from abliterator.bake._sites import runtime_obstacle, runtime_sites
from abliterator.bake._start import sequential_pairs, start_pairs
from abliterator.bake._stored import PANEL_ELEMENTS
from abliterator.bake._workers import bake_on_workers
from abliterator.bake._write import (
    bake,
    bake_file,
    bake_workers,
    require_bounded,
    write_config,
)

__all__ = [
    "PANEL_ELEMENTS",
    "EditPlan",
    "PlannedEdit",
    "adapter_obstacle",
    "bake",
    "bake_file",
    "bake_on_workers",
    "bake_workers",
    "plan_edits",
    "preview_edit",
    "preview_edits",
    "require_adapter_form",
    "require_bounded",
    "require_fit",
    "runtime_obstacle",
    "runtime_sites",
    "sequential_pairs",
    "start_pairs",
    "write_adapter",
    "write_adapters",
    "write_config",
]
