"""The edit at run time, without writing weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from abliterator.bake._plan import EditPlan, PlannedEdit, require_fit
from abliterator.bake._write import removal_of
from abliterator.checkpoint import Checkpoint
from abliterator.errors import RecipeError, UnsupportedModel

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from abliterator.model import LoadedModel
    from abliterator.subspace import Removal

    Remove = Callable[[Tensor], Tensor]
    Choose = Callable[[Sequence[int]], None]


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
    require_fit(basis, plan)

    def remover(edit: PlannedEdit, checkpoint: Checkpoint) -> Remove:
        removal = removal_of(edit.writer, checkpoint, basis).to(_wide(loaded), loaded.device)
        return lambda written: (written @ removal.read) @ removal.take.T

    with _previewed(loaded, plan, remover, strengths or {}):
        yield


@contextmanager
def preview_edits(loaded: LoadedModel, plan: EditPlan, bases: Sequence[Tensor]) -> Iterator[Choose]:
    """Several edits at once: each row of a batch runs under its own, as `preview_edit` would.

    Args:
        loaded: the base.
        plan: which writers are edited, and how strongly.
        bases: the Q of each edit, of any ranks.

    Yields:
        What must be called before each forward pass with the index of every row's edit.

    Raises:
        RecipeError: as `preview_edit`.
        UnsupportedModel: where experts are modules of their own, which see tokens without rows.
    """
    for basis in bases:
        require_fit(basis, plan)
    _require_rows(plan)
    import torch

    chosen: list[Tensor] = []
    known: dict[object, Removal] = {}

    def choose(edits: Sequence[int]) -> None:
        chosen[:] = [torch.tensor(edits, device=loaded.device)]

    def remover(edit: PlannedEdit, checkpoint: Checkpoint) -> Remove:
        # writers that lose the same, with no gain of their own, share one stack of all Q
        own = edit.writer.gains or any(basis.ndim == 3 for basis in bases)
        key = (edit.writer.gains, edit.writer.layer) if own else None
        if key not in known:
            each = [removal_of(edit.writer, checkpoint, basis) for basis in bases]
            known[key] = _stacked(each).to(_wide(loaded), loaded.device)
        removal = known[key]

        def remove(written: Tensor) -> Tensor:
            rows = chosen[0]
            # experts write [rows x tokens, H], one row's tokens together
            by_row = written.view(len(rows), -1, written.shape[-1])
            removed = (by_row @ removal.read[rows]) @ removal.take[rows].mT
            return removed.view_as(written)

        return remove

    with _previewed(loaded, plan, remover, {}):
        yield choose


def _stacked(removals: Sequence[Removal]) -> Removal:
    """[C, H, k], k the largest rank; columns of zeros, which remove nothing, fill up the others."""
    import torch

    from abliterator.subspace import Removal

    k = max(removal.take.shape[1] for removal in removals)

    def filled(matrix: Tensor) -> Tensor:
        return torch.nn.functional.pad(matrix, (0, k - matrix.shape[1]))

    return Removal(
        torch.stack([filled(removal.take) for removal in removals]),
        torch.stack([filled(removal.read) for removal in removals]),
    )


def _require_rows(plan: EditPlan) -> None:
    """Stops where a writer's output does not tell which row of the batch a token is from."""
    found: dict[int, set[str]] = {}
    for edit in plan.edits:
        if edit.writer.component == "expert":
            found.setdefault(edit.writer.layer, set()).add(edit.writer.module)
    several = next((modules for modules in found.values() if len(modules) > 1), None)
    if several is not None:
        raise UnsupportedModel(
            f"Experts are modules of their own here ({min(several)}), so several edits cannot "
            f"share a batch. Name `layers` and `k` in the recipe."
        )


@contextmanager
def _previewed(
    loaded: LoadedModel,
    plan: EditPlan,
    remover: Callable[[PlannedEdit, Checkpoint], Remove],
    strengths: Mapping[str, float | Tensor],
) -> Iterator[None]:
    """Hooks on every planned writer; `remover` makes what each one removes at strength 1."""
    from abliterator.model import hooked

    if plan.settings.norm != "none":
        raise RecipeError("`edit.norm: column` has no run-time form; bake the edit instead.")
    checkpoint = Checkpoint.open(loaded.folder)
    hooks: dict[str, Callable[[Tensor], Tensor]] = {}
    for edit in plan.edits:
        # experts share a module and its edit
        if edit.writer.kind == "weight" and edit.writer.module not in hooks:
            strength = strengths.get(edit.writer.module, edit.strength)
            hooks[edit.writer.module] = _hook(
                loaded, edit, plan, remover(edit, checkpoint), strength
            )
    with hooked(loaded.model, hooks):
        yield


def _hook(
    loaded: LoadedModel,
    edit: PlannedEdit,
    plan: EditPlan,
    remove: Remove,
    strength: float | Tensor,
) -> Callable[[Tensor], Tensor]:
    module = loaded.model.get_submodule(edit.writer.module)
    if not plan.settings.biases and getattr(module, "down_proj_bias", None) is not None:
        raise RecipeError(
            "`edit.biases: false` has no run-time form for experts with biases; bake the edit "
            "instead."
        )
    bias = getattr(module, "bias", None)
    kept_bias = bias if not plan.settings.biases else None
    wide = _wide(loaded)

    def edited(hidden: Tensor) -> Tensor:
        written = hidden.to(wide)
        removable = written if kept_bias is None else written - kept_bias.to(wide)
        return (written - strength * remove(removable)).to(hidden.dtype)

    return edited


def _wide(loaded: LoadedModel) -> torch.dtype:
    """At least float32, so that the preview rounds once, as the baked weights do."""
    import torch

    return torch.promote_types(loaded.model.dtype, torch.float32)
