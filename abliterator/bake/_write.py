"""Writes the edited checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from abliterator.anatomy import Writer
from abliterator.bake._plan import EditPlan, nbytes_of, require_fit, require_sound_scales
from abliterator.bake._stored import StoredEdit, edit_stored, read_vector
from abliterator.checkpoint import (
    CONFIG_FILE,
    INDEX_FILE,
    QUANTISER_FILE,
    Checkpoint,
    FileThreads,
    PatchedTensor,
    TensorInfo,
    auxiliary_files,
    edited_config,
    edited_index,
    edited_quantiser_config,
    patch_file,
    shard_layout,
)
from abliterator.devices import usable_cores, worker_count
from abliterator.errors import DirectionError
from abliterator.files import copy_file, write_text_atomic
from abliterator.record import TensorEdit

if TYPE_CHECKING:
    from torch import Tensor

    from abliterator.subspace import Removal


# A smaller checkpoint is written by one thread, before others would have been started.
_SMALL_BYTES = 32 << 20

# By the axes of a basis: Q of all blocks, of each block, or U and V of each module.
_SUBSPACES: dict[int, Literal["all", "block", "writer"]] = {2: "all", 3: "block", 4: "writer"}

# Bytes that the edit of one tensor holds beside it: its panels, and what it calculates of them.
_PANEL_BYTES = 64 << 20


@contextmanager
def _one_thread() -> Iterator[None]:
    """Runs torch on one thread: panels are too small to share, and other tensors run on others.

    With one thread per core, each of thousands of small steps would wait for a core that is busy.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
def bake(
    checkpoint: Checkpoint,
    plan: EditPlan,
    basis: Tensor,
    out: Path,
    *,
    made_from: Mapping[str, str] | None = None,
    on_bytes: Callable[[int], None] | None = None,
    workers: int | None = None,
) -> tuple[TensorEdit, ...]:
    """Writes the edited checkpoint to `out`: weight files, and every other file a loader needs.

    All bytes outside the planned tensors are the base's; headers and index too, unless quantised
    tensors are written as plain numbers; config.json is what `write_config` makes of it. Memory is
    that of the largest edited tensor (and of it as plain numbers) and a few panels, for each
    worker; their number changes no bit.

    Args:
        checkpoint: the base.
        plan: from `plan_edits` on the same checkpoint.
        basis: Q [H, k], or [L, H, k] with one a block, orthonormal, float64; or pairs [M, 2, H, r].
        out: a folder; files of the same names in it are replaced, each in one step.
        made_from: for config.json.
        on_bytes: called with the size of each weight file when it is done.
        workers: how many tensors are edited at once; by default as many as there are cores, while
            they fit in half of the free memory.

    Returns:
        One `TensorEdit` per edited tensor, in the order of the files.
    """
    require_fit(basis, plan)
    require_sound_scales(checkpoint, plan)
    done: list[TensorEdit] = []
    files = checkpoint.weight_files
    with FileThreads(workers or bake_workers(checkpoint, plan)) as threads:
        editor = _ShardEditor(checkpoint, plan, basis, threads)
        baked = threads.of_files(partial(editor.write, out), files)
        for file, edits in zip(files, baked, strict=True):
            done += edits
            if on_bytes is not None:
                on_bytes(checkpoint.file_bytes[file])
    write_other_files(checkpoint, plan, out, made_from)
    return tuple(done)


def write_other_files(
    checkpoint: Checkpoint, plan: EditPlan, out: Path, made_from: Mapping[str, str] | None = None
) -> None:
    """Writes all of the edited checkpoint but its weight files; arguments are those of `bake`."""
    dequantized = plan.dequantized(checkpoint)
    edited = {
        INDEX_FILE: edited_index(checkpoint, dequantized.dense, dequantized.dropped),
        QUANTISER_FILE: edited_quantiser_config(checkpoint.folder, dequantized.modules),
    }
    for file in auxiliary_files(checkpoint.folder)[0]:
        text = edited.get(file)
        if text is not None:
            write_text_atomic(out / file, text)
        elif file != CONFIG_FILE:
            copy_file(checkpoint.folder / file, out / file)
    write_config(checkpoint, plan, out, made_from)


@_one_thread()
def require_bounded(checkpoint: Checkpoint, plan: EditPlan, basis: Tensor, most: float) -> None:
    """Checks what pairs would store, before anything is written: finite numbers, bounded changes.

    Every tensor is edited in memory, as `bake` edits it.

    Args:
        checkpoint: see `bake`.
        plan: of the edit.
        basis: pairs [M, 2, H, r].
        most: largest |W' - W| / |W| (Frobenius) of a tensor.

    Raises:
        DirectionError: for the tensor that changes most, if that is too much, and for one that
            would be stored with numbers that are not finite.
    """
    require_fit(basis, plan)
    require_sound_scales(checkpoint, plan)
    with FileThreads(bake_workers(checkpoint, plan)) as threads:
        editor = _ShardEditor(checkpoint, plan, basis, threads)
        by_file = threads.of_files(editor.tried, checkpoint.weight_files)
        changes = [change for of_file in by_file for change in of_file]
    name, largest = max(changes, key=lambda change: change[1], default=("", 0.0))
    if largest > most:
        raise DirectionError(
            f"The edit would change {name} by {largest:.3g} of its length (|W' - W| / |W|); at "
            f"most {most:g} was expected (`tuning.max_change`). Nothing was written. Give a larger "
            "`tuning.ridge` or `tuning.kl_weights`, which keep the edit near its start, or allow "
            "more."
        )


@_one_thread()
def bake_file(
    checkpoint: Checkpoint,
    plan: EditPlan,
    basis: Tensor,
    out: Path,
    file: str,
    *,
    workers: int | None = None,
) -> tuple[TensorEdit, ...]:
    """Writes one weight file of the edited checkpoint, as `bake` does; returns its edited tensors.

    Its arguments and its result can be pickled, so that files can be written by other processes and
    machines which have both folders under the same paths.

    Args:
        checkpoint: see `bake`, as for the other arguments.
        plan: of the whole edit.
        basis: of the whole edit.
        out: folder of the edited checkpoint.
        file: one of `checkpoint.weight_files`.
        workers: how many tensors are edited at once.
    """
    require_fit(basis, plan)
    with FileThreads(workers or bake_workers(checkpoint, plan)) as threads:
        editor = _ShardEditor(checkpoint, plan, basis, threads)
        return next(threads.of_files(partial(editor.write, out), [file]))


def bake_workers(checkpoint: Checkpoint, plan: EditPlan, cores: int | None = None) -> int:
    """As many workers as there are cores, while their tensors fit in half of the free memory.

    Args:
        checkpoint: the base.
        plan: of the whole edit.
        cores: those of this process, which shares the machine with others like it: it then has the
            same share of the memory, and one thread more, so that one copies while others compute.
            None is all of them.
    """
    if checkpoint.total_bytes < _SMALL_BYTES:
        return 1
    each = plan.largest_bytes(checkpoint) + _PANEL_BYTES
    if cores is None:
        return worker_count(each)
    processes = -(-(usable_cores() or 1) // cores)
    return min(cores + 1, worker_count(each * processes))


class _ShardEditor:
    """Edits the planned tensors, and dequantizes those that change their format along with them.

    Attributes:
        planned: the edit of each tensor, by its name.
        dequantized: what changes in headers and config.
        infos: all tensors that it changes.
    """

    def __init__(
        self, checkpoint: Checkpoint, plan: EditPlan, basis: Tensor, threads: FileThreads
    ) -> None:
        self._checkpoint, self._threads, self._plan = checkpoint, threads, plan
        self._basis = basis.detach()  # other threads record gradients, whatever the caller's does
        self.dequantized = plan.dequantized(checkpoint)
        self.planned = {edit.info.name: edit for edit in plan.edits}
        names = dict.fromkeys([*self.planned, *self.dequantized.layouts])
        self.infos = [checkpoint.tensors[name] for name in names]
        self._measured: dict[str, StoredEdit] = {}

    def write(self, out: Path, file: str) -> tuple[TensorEdit, ...]:
        """Writes one weight file to the folder `out`; returns its edited tensors in their order."""
        changes = self.dequantized
        shard = shard_layout(self._checkpoint, file, changes.dense, changes.dropped)
        patched = patch_file(
            self._checkpoint.folder / file,
            out / file,
            [info for info in self.infos if info.file == file],
            self,
            layout=shard if shard.changed else None,
            threads=self._threads,
        )
        return tuple(self.report(t) for t in patched.tensors if t.name in self.planned)

    def __call__(self, info: TensorInfo, buffer: memoryview) -> memoryview | None:
        """Edits the bytes of one tensor in place, or returns it as plain numbers."""
        from abliterator.subspace import is_by_writer

        edit, dequantized = self.planned.get(info.name), self.dequantized.layouts.get(info.name)
        layout = edit.layout if edit is not None else dequantized
        check = self._threads.check
        scales = () if layout is None else layout.scales_from(self._checkpoint.read)
        out = None if dequantized is None else memoryview(bytearray(nbytes_of(dequantized.dense)))
        if edit is not None:
            removal = removal_of(edit.writer, self._checkpoint, self._basis, self._plan)
            self._measured[info.name] = edit_stored(
                buffer,
                edit,
                removal,
                self._plan.settings,
                own_pair=is_by_writer(self._basis),
                scales=scales,
                out=out,
                on_panel=check,
            )
        elif dequantized is not None and out is not None:
            dequantized.dequantize(buffer, scales, out, check)
        else:
            raise ValueError(f"{info.name} is neither edited nor quantised")
        return out

    def tried(self, file: str) -> list[tuple[str, float]]:
        """The changes |W' - W| / |W| of the tensors of a weight file, edited in memory alone."""
        changes = []
        for name, edit in self.planned.items():
            if edit.info.file == file:
                self(edit.info, memoryview(bytearray(self._checkpoint.read(name))))
                changes.append((name, self._measured[name].change or 0.0))
        return changes

    def report(self, patched: PatchedTensor) -> TensorEdit:
        """The entry of edits.json for an edited tensor that was written."""
        edit, measured = self.planned[patched.name], self._measured[patched.name]
        return TensorEdit(
            name=edit.info.name,
            file=edit.info.file,
            component=edit.writer.component,
            layer=edit.writer.layer,
            axis=edit.writer.axis,
            gains=edit.writer.gains,
            dtype=edit.info.dtype,
            shape=edit.info.shape,
            storage=edit.layout.kind if edit.layout.quantized else None,
            dequantized=edit.dequantizes,
            k=self._basis.shape[-1],
            subspace=_SUBSPACES[self._basis.ndim],
            strength=edit.strength,
            experts=edit.experts,
            leak=measured.leak,
            change=measured.change,
            noise=measured.noise,
            noise_nearest=measured.noise_nearest,
            sha256_before=patched.sha256_before,
            sha256_after=patched.sha256_after,
        )


def write_config(
    checkpoint: Checkpoint, plan: EditPlan, out: Path, made_from: Mapping[str, str] | None = None
) -> None:
    """Writes config.json of the edited checkpoint, with an entry on the edit.

    Args:
        checkpoint: the base.
        plan: of the edit.
        out: folder of the edited checkpoint.
        made_from: values of the entry beside the version of abliterator: `recipe_digest`, or
            `subspace_sha256` where there was no recipe.
    """
    entry = {"version": version("abliterator"), **(made_from or {})}
    text = edited_config(checkpoint.config, entry, changed=plan.dequantized(checkpoint).config)
    write_text_atomic(out / CONFIG_FILE, text)


def removal_of(writer: Writer, checkpoint: Checkpoint, basis: Tensor, plan: EditPlan) -> Removal:
    """The removal of a writer's subspace (its block's Q), through the gains of norms after it.

    Pairs (U, V) are of what the writer itself writes, before any gains.

    Calculated in float64 on the host, which not every device has; gradients flow to `basis`.
    """
    import torch

    from abliterator.subspace import Removal, basis_of_block, is_by_writer, removal_of_basis

    if is_by_writer(basis):
        take, read = basis[plan.pair_of[writer.module]].cpu().double()
        return Removal(take, read)
    gains = [read_vector(checkpoint, gain) + writer.gain_offset for gain in writer.gains]
    gain = torch.stack(gains).prod(dim=0) if gains else None
    return removal_of_basis(basis_of_block(basis, writer.layer).cpu().double(), gain)
