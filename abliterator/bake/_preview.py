"""The edit at run time, without writing weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from inspect import BoundArguments, signature
from typing import TYPE_CHECKING

from abliterator.bake._plan import EditPlan, PlannedEdit, require_fit
from abliterator.bake._write import removal_of
from abliterator.checkpoint import Checkpoint
from abliterator.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from abliterator.model import Hook, LoadedModel
    from abliterator.subspace import Removal

    Take = Callable[[Tensor], Tensor]
    Share = Callable[[BoundArguments], Tensor]

# What a module of experts calls the indices of those that run for each token, and their weights.
_ROUTED = (("top_k_index", "top_k_weights"), ("router_indices", "routing_weights"))


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

    Where some experts of a block are edited and others not, the experts are run once more with the
    weights of the others 0, and what comes out of that is edited.

    Raises:
        RecipeError: for what no function of the output can imitate: `norm: column`, biases of
            experts that are to stay, and some experts of a module that is not told which run.
    """
    from abliterator.model import CallHook, hooked

    if plan.settings.norm != "none":
        raise RecipeError("`edit.norm: column` has no run-time form; bake the edit instead.")
    require_fit(basis, plan)
    checkpoint = Checkpoint.open(loaded.folder)
    hooks: dict[str, Hook | CallHook] = {}
    seen = set()
    for edit in plan.edits:
        path = edit.writer.module
        if edit.writer.kind == "bias" or path in seen:
            continue  # experts share a module and its edit
        seen.add(path)
        strength = (strengths or {}).get(path, edit.strength)
        takes = _takes(loaded, edit, plan, removal_of(edit.writer, checkpoint, basis), strength)
        chosen = plan.experts_of(path)
        if chosen is None:
            hooks[path] = partial(_edited, takes)
        else:
            path, share = _experts_alone(loaded, path, chosen)
            hooks[path] = CallHook(partial(_edited_share, takes, share))
    with hooked(loaded.model, hooks):
        yield


def _edited(takes: Take, hidden: Tensor) -> Tensor:
    """A write without what the edit takes of it, rounded once, as the baked weights are."""
    return _less(hidden, takes(hidden))


def _edited_share(takes: Take, share: Share, hidden: Tensor, call: BoundArguments) -> Tensor:
    """The same where only a share of the write is edited."""
    return _less(hidden, takes(share(call)))


def _less(hidden: Tensor, taken: Tensor) -> Tensor:
    return (hidden.to(taken.dtype) - taken).to(hidden.dtype)


def _experts_alone(loaded: LoadedModel, path: str, experts: tuple[int, ...]) -> tuple[str, Share]:
    """The module of a block's experts, and what some of them alone add to its output.

    A module of experts is called with the indices of those that run for each token, and with their
    weights. With the weights of all others 0, it is run once more.

    Args:
        loaded: the base.
        path: of the module that the anatomy names: the experts, or what holds them.
        experts: indices.

    Raises:
        RecipeError: for a module that is called in another way.
    """
    modules = dict(loaded.model.named_modules())
    for where in (path, f"{path}.experts"):
        taken = signature(modules[where].forward).parameters if where in modules else {}
        for names in _ROUTED:
            if all(name in taken for name in names):
                return where, partial(_run_some, modules[where], names, experts)
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


def _takes(
    loaded: LoadedModel,
    edit: PlannedEdit,
    plan: EditPlan,
    removal: Removal,
    strength: float | Tensor,
) -> Take:
    """What the edit takes of a write, in float32 at least."""
    import torch

    module = loaded.model.get_submodule(edit.writer.module)
    if not plan.settings.biases and getattr(module, "down_proj_bias", None) is not None:
        raise RecipeError(
            "`edit.biases: false` has no run-time form for experts with biases; bake the edit "
            "instead."
        )
    bias = getattr(module, "bias", None)
    kept_bias = bias if not plan.settings.biases else None
    wide = torch.promote_types(loaded.model.dtype, torch.float32)
    removal = removal.to(wide, loaded.device)

    def takes(hidden: Tensor) -> Tensor:
        written = hidden.to(wide)
        removable = written if kept_bias is None else written - kept_bias.to(wide)
        return strength * ((removable @ removal.read) @ removal.take.T)

    return takes
