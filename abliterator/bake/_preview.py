"""The edit as hooks on a loaded model, without writing weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from inspect import BoundArguments, signature
from typing import TYPE_CHECKING

from abliterator.bake._plan import EditPlan, PlannedEdit, require_fit
from abliterator.bake._write import removal_of
from abliterator.checkpoint import Checkpoint
from abliterator.errors import RecipeError, UnsupportedModel

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from abliterator.anatomy import Writer
    from abliterator.model import Hook, LoadedModel
    from abliterator.subspace import Removal

    Remove = Callable[[Tensor], Tensor]
    Choose = Callable[[Sequence[int]], None]
    Subtract = Callable[..., Tensor]
    Share = Callable[[BoundArguments], Tensor]

# What a module of experts calls the indices of those that run for each token, and their weights.
_ROUTED = (("top_k_index", "top_k_weights"), ("router_indices", "routing_weights"))


# The edit of every row of the batch that runs: batches may advance together, each in its context.
_EDIT_OF_ROWS: ContextVar[Tensor] = ContextVar("edit_of_rows")


@contextmanager
def preview_edit(
    loaded: LoadedModel,
    plan: EditPlan,
    basis: Tensor,
    strengths: Mapping[str, float | Tensor] | None = None,
) -> Iterator[None]:
    """Edits the output of every planned writer at run time: h <- h - s Q Qᵀ h, or h - s U Vᵀ h.

    Where a norm's gain follows the writer, it is the operator of the baked weights that is applied
    (`subspace.Removal`). Equal to the baked weights up to rounding, biases included.

    Args:
        loaded: the base.
        plan: which writers are edited, and how strongly.
        basis: Q [H, k], or [L, H, k] with one a block, or pairs [M, 2, H, r]; gradients flow to it.
        strengths: by module path of the writer, instead of the plan's; gradients flow to tensors.

    Where some experts of a block are edited and others not, the experts are run once more with the
    weights of the others 0, and what comes out of that is edited.

    Raises:
        RecipeError: for edits that no function of the output reproduces: `norm: column`, biases of
            experts that are to stay, and some experts of a module that is not called
            with the indices of those that run.
    """
    require_fit(basis, plan)

    def remover(edit: PlannedEdit, checkpoint: Checkpoint) -> Remove:
        removal = removal_of(edit.writer, checkpoint, basis, plan)
        removal_on = _on_devices(removal, _wide(loaded))
        return lambda written: removal_on(written.device).removed(written)

    with _previewed(loaded, plan, remover, strengths or {}):
        yield


@contextmanager
def preview_edits(
    loaded: LoadedModel,
    plan: EditPlan,
    bases: Sequence[Tensor],
    strengths: Sequence[Mapping[str, float]] = (),
) -> Iterator[Choose]:
    """Runs each row of a batch under its own edit, as `preview_edit` would.

    Args:
        loaded: the base.
        plan: which writers are edited, and how strongly.
        bases: the Q of each edit, of any ranks.
        strengths: of each edit by module path of the writer, instead of the plan's; all edits have
            the plan's unless given.

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

    from abliterator.subspace import Removal

    removals_by_key: dict[object, Callable[[torch.device], Removal]] = {}

    def choose(edits: Sequence[int]) -> None:
        _EDIT_OF_ROWS.set(torch.tensor(edits, device=loaded.device))

    def remover(edit: PlannedEdit, checkpoint: Checkpoint) -> Remove:
        key = _sharing(edit.writer, max(basis.ndim for basis in bases))
        if key not in removals_by_key:
            removals = [removal_of(edit.writer, checkpoint, basis, plan) for basis in bases]
            removals_by_key[key] = _on_devices(_stacked(removals), _wide(loaded))
        removal_on = removals_by_key[key]
        path = edit.writer.module
        own = torch.tensor([of_edit.get(path, edit.strength) for of_edit in strengths])

        def remove(written: Tensor) -> Tensor:
            removal, rows = removal_on(written.device), _EDIT_OF_ROWS.get().to(written.device)
            # experts write [rows x tokens, H], one row's tokens together
            by_row = written.view(len(rows), -1, written.shape[-1])
            by_edit = Removal(removal.take[rows], removal.read[rows])
            removed = by_edit.removed(by_row)
            if len(own):
                removed = removed * own.to(removed)[rows, None, None]
            return removed.view_as(written)

        return remove

    whole = {edit.writer.module: 1.0 for edit in plan.edits} if strengths else {}
    with _previewed(loaded, plan, remover, whole):
        yield choose


def _sharing(writer: Writer, axes: int) -> object:
    """The same for writers that lose the same of bases of so many axes: they share one stack."""
    if axes == 4:  # pairs of each module
        return writer.module
    return (writer.gains, writer.layer) if writer.gains or axes == 3 else None


def _on_devices(removal: Removal, dtype: torch.dtype) -> Callable[[torch.device], Removal]:
    """The removal on a device, copied there once: the blocks of a model may lie on several.

    Gradients flow through the copy, whether or not the first pass that needs it records any.
    """
    import torch

    @cache
    def copied(device: torch.device) -> Removal:
        with torch.inference_mode(mode=False), torch.enable_grad():
            return removal.to(dtype, device)

    return copied


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
    """Checks that the rows of the batch are separate in every writer's output."""
    modules_of: dict[int, set[str]] = {}
    for edit in plan.edits:
        if edit.writer.component == "expert":
            modules_of.setdefault(edit.writer.layer, set()).add(edit.writer.module)
    several = next((modules for modules in modules_of.values() if len(modules) > 1), None)
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
    """Hooks every planned writer; `remover` makes the function of what strength 1 removes."""
    from abliterator.model import CallHook, hooked

    if plan.settings.norm != "none":
        raise RecipeError("`edit.norm: column` has no run-time form; bake the edit instead.")
    checkpoint = Checkpoint.open(loaded.folder)
    hooks: dict[str, Hook | CallHook] = {}
    hooked_paths = set()
    for edit in plan.edits:
        path = edit.writer.module
        if edit.writer.kind == "bias" or path in hooked_paths:
            continue  # experts share a module and its edit
        hooked_paths.add(path)
        strength = strengths.get(path, edit.strength)
        subtract = _subtraction(loaded, edit, plan, remover(edit, checkpoint), strength)
        chosen = plan.experts_of(path)
        if chosen is None:
            hooks[path] = subtract
        else:
            path, share = _experts_alone(loaded, path, chosen)
            hooks[path] = CallHook(partial(_subtract_of_share, subtract, share))
    with hooked(loaded.model, hooks):
        yield


def _experts_alone(loaded: LoadedModel, path: str, experts: tuple[int, ...]) -> tuple[str, Share]:
    """The module of a block's experts, and a function of what some of them add to its output.

    A module of experts is called with the indices of those that run for each token, and with their
    weights. With the weights of all others 0, it is run once more.

    Args:
        loaded: the base.
        path: of the module that the anatomy names: the experts, or what holds them.
        experts: indices.

    Raises:
        RecipeError: for a module with another signature.
    """
    modules = dict(loaded.model.named_modules())
    for candidate in (path, f"{path}.experts"):
        parameters = (
            signature(modules[candidate].forward).parameters if candidate in modules else {}
        )
        for names in _ROUTED:
            if all(name in parameters for name in names):
                return candidate, partial(_run_some, modules[candidate], names, experts)
    raise RecipeError(
        f"`edit.experts` has no run-time form here: {path} of this model is not told which experts "
        "run. Bake the edit instead."
    )


def _run_some(
    module: nn.Module, names: tuple[str, str], experts: tuple[int, ...], call: BoundArguments
) -> Tensor:
    import torch

    indices, weights = (call.arguments[name] for name in names)
    chosen = torch.isin(indices, torch.tensor(experts, device=indices.device))
    call.arguments[names[1]] = weights * chosen
    written: Tensor = module.forward(*call.args, **call.kwargs)  # other kernels, other names
    return written


def _subtraction(
    loaded: LoadedModel, edit: PlannedEdit, plan: EditPlan, remove: Remove, strength: float | Tensor
) -> Subtract:
    """The edit of a writer's output, rounded once, as the baked weights are."""
    import torch

    from abliterator.model import stored_parameter

    module = loaded.model.get_submodule(edit.writer.module)
    if not plan.settings.biases and getattr(module, "down_proj_bias", None) is not None:
        raise RecipeError(
            "`edit.biases: false` has no run-time form for experts with biases; bake the edit "
            "instead."
        )
    keeps_bias = not plan.settings.biases and getattr(module, "bias", None) is not None
    # at the first call: before it, an engine may not have read the weights
    kept_bias = cache(partial(stored_parameter, module, "bias"))
    wide = _wide(loaded)

    def subtract(hidden: Tensor, share: Tensor | None = None) -> Tensor:
        written = (hidden if share is None else share).to(wide)
        removable = written - kept_bias().to(written) if keeps_bias else written
        scale = strength.to(written.device) if isinstance(strength, torch.Tensor) else strength
        removed = scale * remove(removable)
        return (hidden.to(removed.dtype) - removed).to(hidden.dtype)

    return subtract


def _subtract_of_share(
    subtract: Subtract, share: Share, hidden: Tensor, call: BoundArguments
) -> Tensor:
    """The edit of an output of which only a share, that of some experts, is edited."""
    return subtract(hidden, share(call))


def _wide(loaded: LoadedModel) -> torch.dtype:
    """The dtype of the edit: at least float32, so that it rounds once, as baked weights do."""
    import torch

    return torch.promote_types(loaded.model.dtype, torch.float32)
