"""Edits of a served model as adapters: written together, loaded by name, and shown to take part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from abliterator.bake import EditPlan, adapter_obstacle, write_adapters
from abliterator.checkpoint import ADAPTER_CONFIG, Checkpoint
from abliterator.engines._edits import Edit, WriterEdit
from abliterator.engines._vllm._command import AdapterSlots, slot_rank
from abliterator.engines._vllm._http import (
    AdapterRefused,
    first_token,
    load_adapter,
    unload_adapter,
)
from abliterator.files import digest_of, sha256_of_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from abliterator.engines._vllm._process import Address


def obstacle(edit: Edit) -> str | None:
    """What of an edit no adapter of vLLM expresses; None if all is."""
    if not isinstance(edit, WriterEdit):
        return "an edit of the residual stream"
    if slot_rank(edit.basis.shape[-1]) is None:
        return f"an edit of rank {edit.basis.shape[-1]}"
    return adapter_obstacle(edit.plan)


def slots_for(plan: EditPlan, rank: int) -> AdapterSlots | None:
    """The slots that adapters of a plan need, up to a rank; None for one that has no slot."""
    slot = slot_rank(rank)
    return None if slot is None else AdapterSlots(slot, _kinds(plan))


def edit_digest(edit: WriterEdit) -> str:
    """Digest of what an edit does to each weight."""
    plan = planned(edit)
    strengths = {planned_edit.writer.name: planned_edit.strength for planned_edit in plan.edits}
    numbers = edit.basis.detach().double().cpu().contiguous().numpy().tobytes()
    return digest_of([strengths, list(edit.basis.shape), sha256_of_bytes(numbers)])


def baked_digest(edit: WriterEdit) -> str:
    """Digest of what an edit does to each weight, and of how it is rounded and stored."""
    experts = {planned_edit.writer.name: planned_edit.experts for planned_edit in edit.plan.edits}
    settings = edit.plan.settings.model_dump(mode="json")
    return digest_of([edit_digest(edit), experts, settings])


def planned(edit: WriterEdit) -> EditPlan:
    """The plan of an edit at the edit's own strengths."""
    if not edit.strengths:
        return edit.plan
    own = {e.writer.module: e.strength for e in edit.plan.edits}
    return edit.plan.with_strengths({**own, **edit.strengths})


def write_missing(checkpoint: Checkpoint, edits: Mapping[Path, WriterEdit]) -> None:
    """Writes the adapters that are not there yet, those of one plan in one pass over the weights.

    Args:
        checkpoint: the base.
        edits: by folder of the adapter.
    """
    missing = {folder: e for folder, e in edits.items() if not (folder / ADAPTER_CONFIG).exists()}
    together = [folder for folder, edit in missing.items() if not edit.strengths]
    groups = [[folder] for folder, edit in missing.items() if edit.strengths]
    for folder in together:
        group = next((g for g in groups if missing[g[0]].plan is missing[folder].plan), None)
        if group is None or missing[group[0]].strengths:
            groups.append([folder])
        else:
            group.append(folder)
    for group in groups:
        plan, bases = planned(missing[group[0]]), [missing[folder].basis for folder in group]
        _write(checkpoint, plan, bases, group)


@contextmanager
def loaded(address: Address, name: str, folder: Path) -> Iterator[None]:
    """A server that answers under `name` with an adapter, while the context is open.

    Raises:
        AdapterRefused: with what the server says.
    """
    load_adapter(address, name, folder)
    try:
        yield
    finally:
        unload_adapter(address, name)


def require_effect(
    address: Address,
    model: str,
    checkpoint: Checkpoint,
    edit: WriterEdit,
    prompt: Sequence[int],
    scratch: Path,
) -> None:
    """Checks that the adapter of each kind of module changes what the server answers.

    A server leaves out modules of names that it does not know, without an error: the candidates
    would be measured as if part of the edit were missing.

    Args:
        address: of the server.
        model: name of the unedited model.
        checkpoint: the base.
        edit: any that changes answers.
        prompt: token ids.
        scratch: a folder for adapters.

    Raises:
        AdapterRefused: for a kind of module that stays as it was.
    """
    plan, before = planned(edit), first_token(address, model, prompt)
    for kind in _kinds(plan):
        of_kind = tuple(e for e in plan.edits if _kind(e.writer.module) == kind)
        folder = scratch / f"only-{kind}"
        _write(checkpoint, replace(plan, edits=of_kind), [edit.basis], [folder])
        with loaded(address, folder.name, folder):
            if first_token(address, folder.name, prompt) == before:
                raise AdapterRefused(
                    f"vLLM loads an adapter of the modules {kind}, and answers as if it were not "
                    "there"
                )


def _write(
    checkpoint: Checkpoint, plan: EditPlan, bases: Sequence[Tensor], folders: Sequence[Path]
) -> None:
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    write_adapters(checkpoint, plan, bases, folders, base_model=checkpoint.folder.name)


def _kinds(plan: EditPlan) -> tuple[str, ...]:
    return tuple(sorted({_kind(edit.writer.module) for edit in plan.edits}))


def _kind(module: str) -> str:
    """The last part of a module's path, by which vLLM names modules."""
    return module.rpartition(".")[2]
