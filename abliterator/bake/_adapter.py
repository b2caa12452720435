"""The edit as a low-rank adapter (LoRA) in PEFT's format, beside an untouched base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from abliterator.bake._plan import EditPlan, PlannedEdit, require_fit
from abliterator.bake._stored import PANEL_ELEMENTS
from abliterator.bake._write import removal_of
from abliterator.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_METADATA,
    ADAPTER_WEIGHTS,
    Checkpoint,
    adapter_config,
    adapter_tensors,
)
from abliterator.errors import RecipeError, UnsupportedModel
from abliterator.files import write_bytes_atomic, write_text_atomic

if TYPE_CHECKING:
    from torch import Tensor


def require_adapter_form(plan: EditPlan) -> None:
    """Checks that every edit adds a product of two thin matrices to a linear module's weight.

    Raises:
        RecipeError: for `norm: column`, embeddings and biases, which the recipe can leave out.
        UnsupportedModel: for weights that are no plain matrix [out, in] of a module of their own.
    """
    if plan.settings.norm != "none":
        raise RecipeError(
            f"`edit.norm: {plan.settings.norm}` has no low-rank form, which `edit.output` asks "
            "for. Leave `norm: none`, or `output: checkpoint`."
        )
    # biases last: to leave them out helps only where the weights have a form
    for edit in sorted(plan.edits, key=lambda edit: edit.writer.kind == "bias"):
        _require_low_rank(edit)


def adapter_obstacle(plan: EditPlan) -> str | None:
    """What of an edit no adapter expresses: a key of the recipe or a tensor; None if all is."""
    if plan.settings.norm != "none":
        return f"`edit.norm: {plan.settings.norm}`"
    for edit in plan.edits:
        try:
            _require_low_rank(edit)
        except (RecipeError, UnsupportedModel):
            return edit.writer.name
    return None


def write_adapter(
    checkpoint: Checkpoint,
    plan: EditPlan,
    basis: Tensor,
    out: Path,
    *,
    base_model: str,
    revision: str | None = None,
) -> tuple[Path, Path]:
    """Writes the edit W' = W - s A Bᵀ W as a LoRA of rank k and scale 1 that PEFT loads.

    `lora_A` is Bᵀ W [k, in] and `lora_B` is -s A [out, k] (`subspace.Removal`), in float32: merged
    into the base they give the baked weights, up to rounding. Memory is that of the largest edited
    tensor and the adapter.

    Args:
        checkpoint: the base.
        plan: which writers are edited, and how strongly; as `require_adapter_form` requires it.
        basis: Q [H, k], or [L, H, k] with one a block, orthonormal, float64; or pairs [M, 2, H, r].
        out: a folder; files of the same names in it are replaced, each in one step.
        base_model: Hub id or name of the base, for PEFT's config.
        revision: commit of the base.

    Returns:
        Paths of the config and of the weights.
    """
    write_adapters(checkpoint, plan, [basis], [out], base_model=base_model, revision=revision)
    return out / ADAPTER_CONFIG, out / ADAPTER_WEIGHTS


def write_adapters(
    checkpoint: Checkpoint,
    plan: EditPlan,
    bases: Sequence[Tensor],
    folders: Sequence[Path],
    *,
    base_model: str,
    revision: str | None = None,
) -> None:
    """Writes the adapters of several subspaces, as `write_adapter`; each tensor is read once.

    Args:
        checkpoint: the base.
        plan: which writers are edited, and how strongly; as `require_adapter_form` requires it.
        bases: Q of each adapter, of any ranks.
        folders: one for each.
        base_model: Hub id or name of the base, for PEFT's config.
        revision: commit of the base.
    """
    from safetensors.torch import save

    require_adapter_form(plan)
    for basis in bases:
        require_fit(basis, plan)
    adapters: list[dict[str, Tensor]] = [{} for _ in bases]
    for edit in plan.edits:
        factors = _factors(checkpoint, plan, edit, bases)
        for tensors, pair in zip(adapters, factors, strict=True):
            tensors.update(zip(adapter_tensors(edit.writer.module), pair, strict=True))
    modules = [edit.writer.module for edit in plan.edits]
    for basis, tensors, out in zip(bases, adapters, folders, strict=True):
        config = adapter_config(base_model, revision, modules=modules, rank=basis.shape[-1])
        write_bytes_atomic(out / ADAPTER_WEIGHTS, save(tensors, metadata=ADAPTER_METADATA))
        write_text_atomic(out / ADAPTER_CONFIG, config)


def _factors(
    checkpoint: Checkpoint, plan: EditPlan, edit: PlannedEdit, bases: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Bᵀ W [k, in] and -s A [out, k] of one writer for each subspace, in float32.

    They are calculated in float64.
    """
    import torch

    removals = [removal_of(edit.writer, checkpoint, basis, plan) for basis in bases]
    stored = bytearray(checkpoint.read(edit.info.name))
    (matrix,) = edit.layout.matrices(stored, edit.writer.axis)
    reads: list[list[Tensor]] = [[] for _ in bases]
    for columns in matrix.ranges(PANEL_ELEMENTS):
        panel = matrix.decoded(*columns).double()
        for of_basis, removal in zip(reads, removals, strict=True):
            of_basis.append(removal.reads(panel))
    return [
        (
            torch.cat(of_basis, dim=1).float().contiguous(),
            (-edit.strength * removal.take).float().contiguous(),
        )
        for of_basis, removal in zip(reads, removals, strict=True)
    ]


def _require_low_rank(edit: PlannedEdit) -> None:
    writer = edit.writer
    if writer.kind == "bias":
        raise RecipeError(
            f"An adapter cannot edit the bias {writer.name}, and `edit.output` asks for one. Set "
            "`edit.biases: false`, which leaves what the bias writes, or `output: checkpoint`."
        )
    if writer.component == "embedding":
        raise RecipeError(
            f"`edit.embeddings` would edit {writer.name}, which the adapter that `edit.output` "
            "asks for leaves alone. Leave `embeddings: false`, or `output: checkpoint`."
        )
    if edit.layout.quantized:
        raise _no_adapter(edit, f"is stored in units of scales ({edit.layout.kind})")
    if writer.component == "expert" or writer.fused or len(edit.info.shape) != 2:
        raise _no_adapter(edit, "belongs to experts, which share a module")
    if writer.axis != 0:
        raise _no_adapter(edit, "is stored [in, out], not as a linear module's [out, in]")
    if writer.component == "ssm":
        raise _no_adapter(edit, "is read by a state space's kernel past any adapter")


def _no_adapter(edit: PlannedEdit, reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"`edit.output` asks for an adapter, and {edit.writer.name} {reason}. "
        "Set `edit.output: checkpoint`."
    )
