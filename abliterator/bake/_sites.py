"""The edit as sites of a file of directions: modules, strengths, and what is removed there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from abliterator.bake._plan import EditPlan, require_fit
from abliterator.bake._write import removal_of
from abliterator.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from abliterator.directions import Site


def runtime_sites(
    plan: EditPlan, checkpoint: Checkpoint, basis: Tensor
) -> tuple[tuple[Site, ...], dict[str, Tensor]]:
    """Every module whose output is edited, and the tensors that are not the subspace itself.

    Where a norm's gain follows a writer, what is removed of its output is another subspace
    (`subspace.Removal`), and with pairs every module has its own U and V: those sites have a `read`
    and a `take` of their own, in float32.

    Args:
        plan: which writers are edited, and how strongly.
        checkpoint: the base.
        basis: Q [H, k], or [L, H, k], or pairs [M, 2, H, r].
    """
    from abliterator.directions import Site
    from abliterator.subspace import is_by_writer

    require_fit(basis, plan)
    biased = {writer.module for writer in plan.writers if writer.kind == "bias"}
    sites: dict[str, Site] = {}
    tensors: dict[str, Tensor] = {}
    for edit in plan.edits:
        writer = edit.writer
        if writer.kind == "bias" or writer.module in sites:
            continue  # experts share a module and its edit
        names = {}
        if writer.gains or is_by_writer(basis):
            removal = removal_of(writer, checkpoint, basis, plan)
            names = {"read": f"{writer.module}.read", "take": f"{writer.module}.take"}
            tensors |= {names["read"]: removal.read.float(), names["take"]: removal.take.float()}
        sites[writer.module] = Site(
            module=writer.module,
            block=writer.layer,
            component=writer.component,
            strength=edit.strength,
            keeps_bias=writer.module in biased and not plan.settings.biases,
            **names,
        )
    return tuple(sites.values()), tensors


def runtime_obstacle(plan: EditPlan) -> str | None:
    """Why no function of the modules' outputs equals the edit; None if one does."""
    if plan.settings.norm != "none":
        return f"`edit.norm: {plan.settings.norm}` rescales the columns of the weights"
    if any(plan.experts_of(edit.writer.module) is not None for edit in plan.edits):
        return "some experts of a module that adds up all of them, or copies of its input, stay"
    of_experts = (w for w in plan.writers if w.kind == "bias" and w.component == "expert")
    if not plan.settings.biases and any(of_experts):
        return "`edit.biases: false` leaves the biases of experts, which no output shows"
    return None
