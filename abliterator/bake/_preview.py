"""The edit at run time, without writing weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from abliterator.bake._plan import EditPlan, PlannedEdit, require_fit
from abliterator.bake._write import removal_of
from abliterator.checkpoint import Checkpoint
from abliterator.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from abliterator.model import LoadedModel
    from abliterator.subspace import Removal


@contextmanager
def preview_edit(
    loaded: LoadedModel,
    plan: EditPlan,
    basis: Tensor,
    strengths: Mapping[str, float | Tensor] | None = None,
) -> Iterator[None]:
    """The edit at run time, on the output of every planned writer: h <- h - s Q Qᵀ h.

    Where a norm's gain follows the writer, it is the operator of the baked weights that is applied
    (`subspace.Removal`). Equal to the baked weights up to rounding, biases included.

    Args:
        loaded: the base.
        plan: which writers are edited, and how strongly.
        basis: Q [H, k], or [L, H, k] with one a block; gradients flow to it.
        strengths: by module path of the writer, instead of the plan's; gradients flow to tensors.

    Raises:
        RecipeError: for what no function of the output can imitate: `norm: column`, and biases of
            experts that are to stay.
    """
    from abliterator.model import hooked

    if plan.settings.norm != "none":
        raise RecipeError("`edit.norm: column` has no run-time form; bake the edit instead.")
    require_fit(basis, plan)
    checkpoint = Checkpoint.open(loaded.folder)
    hooks: dict[str, Callable[[Tensor], Tensor]] = {}
    for edit in plan.edits:
        # experts share a module and its edit
        if edit.writer.kind == "weight" and edit.writer.module not in hooks:
            strength = (strengths or {}).get(edit.writer.module, edit.strength)
            removal = removal_of(edit.writer, checkpoint, basis)
            hooks[edit.writer.module] = _remover(loaded, edit, plan, removal, strength)
    with hooked(loaded.model, hooks):
        yield


def _remover(
    loaded: LoadedModel,
    edit: PlannedEdit,
    plan: EditPlan,
    removal: Removal,
    strength: float | Tensor,
) -> Callable[[Tensor], Tensor]:
    import torch

    module = loaded.model.get_submodule(edit.writer.module)
    if not plan.settings.biases and getattr(module, "down_proj_bias", None) is not None:
        raise RecipeError(
            "`edit.biases: false` has no run-time form for experts with biases; bake the edit "
            "instead."
        )
    bias = getattr(module, "bias", None)
    kept_bias = bias if not plan.settings.biases else None
    # at least float32, so that the preview rounds once, as the baked weights do
    wide = torch.promote_types(loaded.model.dtype, torch.float32)
    removal = removal.to(wide, loaded.device)

    def remove(hidden: Tensor) -> Tensor:
        written = hidden.to(wide)
        removable = written if kept_bias is None else written - kept_bias.to(wide)
        removed = (removable @ removal.read) @ removal.take.T
        return (written - strength * removed).to(hidden.dtype)

    return remove
