"""Directions into a checkpoint: the edit planned, previewed at run time, written into the files.

`bake` edits files, not a model in memory: untouched byte ranges are streamed, and each writer of
the residual stream is read, edited in column panels, and written at its old place. The room does
not know how directions were found.

    plan = plan_edits(checkpoint, anatomy, EditSettings())
    with preview_edit(loaded, plan, basis): ...          # the same edit without writing weights
    edits = bake(checkpoint, plan, basis, Path("out/checkpoint"))

H = d_model, k rank, Q [H, k] the orthonormal basis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from abliterator.anatomy import Anatomy, Writer
from abliterator.checkpoint import (
    Checkpoint,
    PatchedTensor,
    TensorInfo,
    carried_files,
    copy_file,
    patch_file,
)
from abliterator.errors import RecipeError, UnsupportedModel
from abliterator.formats import Format, format_of, other_neighbour
from abliterator.record import TensorEdit

if TYPE_CHECKING:
    from torch import Tensor

    from abliterator.model import LoadedModel

# Elements of one panel: small enough for tens of megabytes in all, large enough that the loop over
# panels is free.
PANEL_ELEMENTS = 1 << 21


@dataclass(frozen=True)
class EditSettings:
    """How writers are edited; the fields mean what they mean in a recipe's `edit`."""

    strength: Mapping[str, float] = field(default_factory=lambda: {"attention": 1.0, "mlp": 1.0})
    norm: Literal["none", "column"] = "none"
    rounding: Literal["nearest", "compensated"] = "compensated"
    embeddings: bool = False
    biases: bool = True


@dataclass(frozen=True)
class PlannedEdit:
    """One tensor that will be edited, where it lies, and how strongly."""

    writer: Writer
    info: TensorInfo
    strength: float


@dataclass(frozen=True)
class EditPlan:
    """Every tensor that will be edited, in no order that matters; nothing else is touched."""

    edits: tuple[PlannedEdit, ...]
    settings: EditSettings
    d_model: int

    @property
    def edited_bytes(self) -> int:
        """Bytes that will be written anew."""
        return sum(edit.info.nbytes for edit in self.edits)


def plan_edits(checkpoint: Checkpoint, anatomy: Anatomy, settings: EditSettings) -> EditPlan:
    """Which tensors will be edited, from headers alone; loads no weights and no torch.

    Raises:
        UnsupportedModel: for a tensor the anatomy does not know or does not find, a storage format
            that cannot be edited, and embeddings that are tied to the output head.
    """
    edits = []
    for writer in anatomy.writers(checkpoint.shapes):
        strength = _strength_of(writer, settings)
        if strength == 0 or (writer.kind == "bias" and not settings.biases):
            continue
        info = checkpoint.tensors[writer.name]
        format_of(info.dtype, writer.name)
        if writer.component == "embedding" and anatomy.tied_embeddings:
            raise UnsupportedModel(
                f"`edit.embeddings` would edit {writer.name}, which is also the output head of "
                f"this model (tied): the head would change too. Leave `embeddings: false`."
            )
        edits.append(PlannedEdit(writer, info, strength))
    return EditPlan(tuple(edits), settings, anatomy.d_model)


def _strength_of(writer: Writer, settings: EditSettings) -> float:
    if writer.component == "embedding":
        return float(settings.embeddings)
    return settings.strength.get(writer.component, 0.0)


def bake(
    checkpoint: Checkpoint,
    plan: EditPlan,
    basis: Tensor,
    out: Path,
    *,
    on_bytes: Callable[[int], None] | None = None,
) -> tuple[TensorEdit, ...]:
    """Writes the edited checkpoint to `out`: weight files, and every other file a loader needs.

    All bytes outside the planned tensors, headers included, are the base's. Memory is that of the
    largest edited tensor and a few panels.

    Args:
        checkpoint: the base.
        plan: from `plan_edits` on the same checkpoint.
        basis: Q [H, k], orthonormal, float64.
        out: a folder; files of the same names in it are replaced, each in one step.
        on_bytes: called with the size of each weight file when it is done.

    Returns:
        One `TensorEdit` per edited tensor, in the order of the files.
    """
    require_d_model(basis, plan.d_model)
    planned = {edit.writer.name: edit for edit in plan.edits}
    done: list[TensorEdit] = []
    for file in checkpoint.weight_files:
        leaks: dict[str, float | None] = {}

        def rewrite(
            info: TensorInfo, buffer: memoryview, leaks: dict[str, float | None] = leaks
        ) -> None:
            leaks[info.name] = edit_stored(buffer, planned[info.name], basis, plan.settings)

        infos = [edit.info for edit in plan.edits if edit.info.file == file]
        patched = patch_file(checkpoint.folder / file, out / file, infos, rewrite)
        done += [
            _report(planned[tensor.name], basis, leaks[tensor.name], tensor)
            for tensor in patched.tensors
        ]
        if on_bytes is not None:
            on_bytes(patched.size)
    for file in carried_files(checkpoint.folder)[0]:
        copy_file(checkpoint.folder / file, out / file)
    return tuple(done)


def require_d_model(basis: Tensor, d_model: int) -> None:
    """Raises UnsupportedModel unless the subspace [H, k] was made for a model of this width."""
    if basis.shape[0] != d_model:
        raise UnsupportedModel(
            f"The subspace has {basis.shape[0]} dimensions, the model's residual stream {d_model}: "
            f"it was made for another model."
        )


def _report(
    edit: PlannedEdit, basis: Tensor, leak: float | None, patched: PatchedTensor
) -> TensorEdit:
    return TensorEdit(
        name=edit.writer.name,
        file=edit.info.file,
        component=edit.writer.component,
        layer=edit.writer.layer,
        axis=edit.writer.axis,
        dtype=edit.info.dtype,
        shape=edit.info.shape,
        k=basis.shape[1],
        strength=edit.strength,
        leak=leak,
        sha256_before=patched.sha256_before,
        sha256_after=patched.sha256_after,
    )


def edit_stored(
    buffer: memoryview, edit: PlannedEdit, basis: Tensor, settings: EditSettings
) -> float | None:
    """Edits the stored bytes of one tensor in place, panel by panel.

    Returns:
        The leak |Qᵀ W'| / |Qᵀ W| measured on the bytes as stored, or None if W wrote nothing into
        the subspace to begin with.
    """
    from abliterator.subspace import ablate, keep_column_norms, squared_write

    fmt = format_of(edit.info.dtype, edit.info.name)
    weight = residual_first(fmt.view(buffer, edit.info.shape), edit.writer.axis)
    q = basis.to(fmt.compute_dtype)
    before = after = 0.0
    width = max(1, PANEL_ELEMENTS // weight.shape[0])
    for start in range(0, weight.shape[1], width):
        panel = weight[:, start : start + width]
        original = panel.to(fmt.compute_dtype)
        exact = ablate(original, q, edit.strength)
        # a bias is no matrix with columns that scale what was read: it has no norm to keep
        if settings.norm == "column" and edit.writer.kind == "weight":
            exact = keep_column_norms(exact, original)
        panel.copy_(_rounded(exact, q, settings.rounding, fmt))
        before += squared_write(original, q)
        after += squared_write(panel.to(fmt.compute_dtype), q)
    return (after / before) ** 0.5 if before > 0 else None


def residual_first(tensor: Tensor, axis: int) -> Tensor:
    """A view [H, c] of a stored tensor whose `axis` lies in the residual stream; a bias has 1."""
    if tensor.ndim == 1:
        return tensor[:, None]
    return tensor if axis == 0 else tensor.T


def _rounded(exact: Tensor, q: Tensor, rounding: str, fmt: Format) -> Tensor:
    """The edited panel [H, c] in the stored dtype."""
    import torch

    from abliterator.subspace import compensate

    nearest = exact.to(fmt.stored_dtype)
    if rounding == "nearest":
        return nearest
    other = other_neighbour(nearest, exact, fmt)
    choice = compensate(nearest.to(exact.dtype), other.to(exact.dtype), exact, q)
    return torch.where(choice, other, nearest)


@contextmanager
def preview_edit(loaded: LoadedModel, plan: EditPlan, basis: Tensor) -> Iterator[None]:
    """The edit at run time: h <- h - s Q Qᵀ h on the output of every planned writer.

    Equal to the baked weights up to rounding, biases included.

    Raises:
        RecipeError: for `norm: column`, which no function of the output can imitate.
    """
    from abliterator.model import hooked

    if plan.settings.norm != "none":
        raise RecipeError("`edit.norm: column` has no run-time form; bake the edit instead.")
    require_d_model(basis, plan.d_model)
    hooks = {
        edit.writer.module: _remover(loaded, edit, plan, basis)
        for edit in plan.edits
        if edit.writer.kind == "weight"
    }
    with hooked(loaded.model, hooks):
        yield


def _remover(
    loaded: LoadedModel, edit: PlannedEdit, plan: EditPlan, basis: Tensor
) -> Callable[[Tensor], Tensor]:
    import torch

    module = loaded.model.get_submodule(edit.writer.module)
    bias = getattr(module, "bias", None)
    kept_bias = bias if not plan.settings.biases else None
    # at least float32, so that the preview rounds once, as the baked weights do
    wide = torch.promote_types(loaded.model.dtype, torch.float32)
    q = basis.to(loaded.device, wide)

    def remove(hidden: Tensor) -> Tensor:
        written = hidden.to(wide)
        removable = written if kept_bias is None else written - kept_bias.to(wide)
        return (written - edit.strength * (removable @ q) @ q.T).to(hidden.dtype)

    return remove
