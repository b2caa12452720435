"""A bake whose weight files are written by workers, whichever is free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from abliterator.bake._plan import EditPlan, require_fit, require_sound_scales
from abliterator.bake._write import bake_file, bake_workers, write_other_files
from abliterator.checkpoint import Checkpoint
from abliterator.devices import release_memory
from abliterator.record import TensorEdit
from abliterator.workers import PackedTensor, Pool, Resident, pack_tensor, unpack_tensor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class BakeFile:
    """Writes weight files of an edited checkpoint in a worker, as `bake_file` does.

    Attributes:
        checkpoint: the base.
        plan: of the whole edit.
        basis: Q of the whole edit.
        out: folder of the edited checkpoint.
    """

    checkpoint: Checkpoint
    plan: EditPlan
    basis: PackedTensor
    out: Path

    @contextmanager
    def opened(self, resident: Resident) -> Iterator[Callable[[str], tuple[TensorEdit, ...]]]:
        """What writes one file; the worker's model makes room for the tensors."""
        resident.kept.clear()
        release_memory()
        workers = bake_workers(self.checkpoint, self.plan, resident.threads)
        basis = unpack_tensor(self.basis)
        yield partial(bake_file, self.checkpoint, self.plan, basis, self.out, workers=workers)


def bake_on_workers(
    pool: Pool,
    checkpoint: Checkpoint,
    plan: EditPlan,
    basis: Tensor,
    out: Path,
    *,
    made_from: Mapping[str, str] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> tuple[TensorEdit, ...]:
    """Writes the edited checkpoint to `out`, as `bake` does, with a weight file a worker at a time.

    A file that a worker was writing when it died is written again from its start, by another. All
    other files are written by this process. The bytes are those of `bake`.

    Args:
        pool: the workers; all must see the base's folder and `out`.
        checkpoint: see `bake`, as for the other arguments, the result and the errors.
        plan: of the edit.
        basis: of the edit.
        out: folder of the edited checkpoint.
        made_from: for config.json.
        on_bytes: called with the size of each weight file when it and those before it are done.

    Raises:
        WorkerError: if workers die on one file three times, or none is left.
    """
    require_fit(basis, plan)
    require_sound_scales(checkpoint, plan)
    shared = replace(checkpoint, folder=checkpoint.folder.resolve())
    job = pool.number(BakeFile(shared, plan, pack_tensor(basis), out.resolve()))
    files, done = checkpoint.weight_files, list[TensorEdit]()
    for file, edits in zip(files, pool.map(job, files), strict=True):
        done += edits
        if on_bytes is not None:
            on_bytes(checkpoint.file_bytes[file])
    write_other_files(checkpoint, plan, out, made_from)
    return tuple(done)
