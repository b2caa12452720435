"""An edit plan and a subspace into files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from abliterator.anatomy import Writer
from abliterator.bake._plan import EditPlan, PlannedEdit, require_fit
from abliterator.bake._stored import edit_stored, read_scale, read_vector
from abliterator.checkpoint import (
    CONFIG_FILE,
    Checkpoint,
    PatchedTensor,
    TensorInfo,
    carried_files,
    copy_file,
    edited_config,
    patch_file,
    write_text_atomic,
)
from abliterator.record import TensorEdit

if TYPE_CHECKING:
    from torch import Tensor

    from abliterator.subspace import Removal


def bake(
    checkpoint: Checkpoint,
    plan: EditPlan,
    basis: Tensor,
    out: Path,
    *,
    made_from: Mapping[str, str] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> tuple[TensorEdit, ...]:
    """Writes the edited checkpoint to `out`: weight files, and every other file a loader needs.

    All bytes outside the planned tensors, headers included, are the base's; config.json is what
    `write_config` makes of it. Memory is that of the largest edited tensor and a few panels.

    Args:
        checkpoint: the base.
        plan: from `plan_edits` on the same checkpoint.
        basis: Q [H, k], or [L, H, k] with one a block, orthonormal, float64.
        out: a folder; files of the same names in it are replaced, each in one step.
        made_from: for config.json.
        on_bytes: called with the size of each weight file when it is done.

    Returns:
        One `TensorEdit` per edited tensor, in the order of the files.
    """
    require_fit(basis, plan)
    with _one_thread():
        return _bake(checkpoint, plan, basis, out, made_from, on_bytes)


def _bake(
    checkpoint: Checkpoint,
    plan: EditPlan,
    basis: Tensor,
    out: Path,
    made_from: Mapping[str, str] | None,
    on_bytes: Callable[[int], None] | None,
) -> tuple[TensorEdit, ...]:
    planned = {edit.writer.name: edit for edit in plan.edits}
    done: list[TensorEdit] = []
    for file in checkpoint.weight_files:
        leaks: dict[str, float | None] = {}

        def rewrite(
            info: TensorInfo, buffer: memoryview, leaks: dict[str, float | None] = leaks
        ) -> None:
            edit = planned[info.name]
            scale = read_scale(checkpoint, edit)
            removal = removal_of(edit.writer, checkpoint, basis)
            leaks[info.name] = edit_stored(buffer, edit, removal, plan.settings, scale)

        infos = [edit.info for edit in plan.edits if edit.info.file == file]
        patched = patch_file(checkpoint.folder / file, out / file, infos, rewrite)
        done += [
            _report(planned[tensor.name], basis, leaks[tensor.name], tensor)
            for tensor in patched.tensors
        ]
        if on_bytes is not None:
            on_bytes(patched.size)
    for file in carried_files(checkpoint.folder)[0]:
        if file != CONFIG_FILE:
            copy_file(checkpoint.folder / file, out / file)
    write_config(checkpoint, out, made_from)
    return tuple(done)


def write_config(
    checkpoint: Checkpoint, out: Path, made_from: Mapping[str, str] | None = None
) -> None:
    """Writes config.json of the edited checkpoint, with an entry that says who edited it.

    Args:
        checkpoint: the base.
        out: folder of the edited checkpoint.
        made_from: what stands in the entry beside the version of abliterator: `recipe_digest`, or
            `subspace_sha256` where there was no recipe.
    """
    entry = {"version": version("abliterator"), **(made_from or {})}
    write_text_atomic(out / CONFIG_FILE, edited_config(checkpoint.config, entry))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch on one thread: panels are too small to share, and files are hashed on another.

    With one thread per core, each of thousands of small steps would wait for a core that hashes.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def removal_of(writer: Writer, checkpoint: Checkpoint, basis: Tensor) -> Removal:
    """How the Q of its block is removed from what a writer writes: through the gains after it."""
    import torch

    from abliterator.subspace import basis_of_block, removal_of_basis

    gains = [read_vector(checkpoint, gain) + writer.gain_offset for gain in writer.gains]
    gain = torch.stack(gains).prod(dim=0) if gains else None
    return removal_of_basis(basis_of_block(basis, writer.layer).double(), gain)


def _report(
    edit: PlannedEdit, basis: Tensor, leak: float | None, patched: PatchedTensor
) -> TensorEdit:
    return TensorEdit(
        name=edit.writer.name,
        file=edit.info.file,
        component=edit.writer.component,
        layer=edit.writer.layer,
        axis=edit.writer.axis,
        gains=edit.writer.gains,
        dtype=edit.info.dtype,
        shape=edit.info.shape,
        k=basis.shape[-1],
        subspace="all" if basis.ndim == 2 else "block",
        strength=edit.strength,
        experts=edit.experts,
        leak=leak,
        sha256_before=patched.sha256_before,
        sha256_after=patched.sha256_after,
    )
