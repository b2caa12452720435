"""Compares an adapter, merged into its base, with the checkpoint of the same edit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from abliterator.anatomy import anatomy_of
from abliterator.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_METADATA,
    ADAPTER_WEIGHTS,
    Checkpoint,
    adapter_config,
    adapter_tensors,
)
from abliterator.errors import CheckpointError
from abliterator.files import read_text, sha256_of_file
from abliterator.formats import FORMATS, Format
from abliterator.record import AdapterVerification, RunRecord, TensorEdit
from abliterator.verification._auxiliary import card_faults
from abliterator.verification._compare import files_of
from abliterator.verification._findings import CARD, EDITS, RECORD, Findings, read_edits
from abliterator.verification._leak import PANEL_ELEMENTS, leak_meter
from abliterator.verification._pairs import FACTORS, is_rounding

if TYPE_CHECKING:
    from torch import Tensor


def verify_adapter(
    base: Path, checkpoint: Path, adapter: Path, *, subspace: Path | None = None
) -> AdapterVerification:
    """Compares base + adapter with a checkpoint, which `verify` has proven, module by module.

    The config must be the one text that the edits allow, the weights those factors that the edits
    name. Merged in float64 they must give the checkpoint's weights up to rounding; with the
    subspace, they must write into it what each strength says, which no rounding hides.

    Args:
        base: folder of the base model.
        checkpoint: folder of the edited one.
        adapter: folder of the adapter.
        subspace: safetensors file with the removed subspace Q [H, k], or [L, H, k].

    Raises:
        CheckpointError: if base or checkpoint cannot be read, or the edit has no low-rank form.
    """
    from abliterator.card import render_adapter_card

    opened, edited = Checkpoint.open(base), Checkpoint.open(checkpoint)
    edits, findings = read_edits(checkpoint), Findings()
    modules, record = _modules(opened, edits), _record_in(checkpoint)
    _check_config(adapter, record, edits, modules.values(), findings)
    tensors = _read_tensors(adapter, findings)
    expected = {name for module in modules.values() for name in adapter_tensors(module)}
    findings.faults += [
        f"{ADAPTER_WEIGHTS} has {name}, which no edit asks for."
        for name in sorted(tensors.keys() - expected)
    ]
    meter = leak_meter(opened, subspace)
    for edit in edits:
        factors = _factors(edit, modules[edit.name], tensors, findings)
        if factors is not None:
            reads = None if meter is None else meter.reads(edit.name)
            _compare(edit, _measured(edit, (opened, edited), factors, reads), findings)
    if record is not None:
        findings.faults += card_faults(adapter, render_adapter_card(record), record)
    ours = {ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD}
    return AdapterVerification(
        faults=tuple(findings.faults),
        modules=len(modules),
        max_apart=max(findings.apart, default=None),
        max_leak=max(findings.leaks, default=None),
        sha256={name: sha256_of_file(adapter / name) for name in sorted(ours & files_of(adapter))},
        foreign=tuple(sorted(files_of(adapter) - ours)),
    )


def _modules(base: Checkpoint, edits: Iterable[TensorEdit]) -> dict[str, str]:
    """The run-time module of each edited tensor, by the tensor's name."""
    writers = {writer.name: writer for writer in anatomy_of(base.config).writers(base.shapes)}
    for edit in edits:
        is_plain = edit.dtype in FORMATS and len(edit.shape) == 2
        if edit.name not in writers or not is_plain or edit.axis != 0:
            raise CheckpointError(
                f"{edit.name} was edited, and an edit of it has no low-rank form; an adapter of "
                "plain matrices was expected. Build it again."
            )
    return {edit.name: writers[edit.name].module for edit in edits}


def _check_config(
    adapter: Path,
    record: RunRecord | None,
    edits: tuple[TensorEdit, ...],
    modules: Iterable[str],
    findings: Findings,
) -> None:
    """adapter_config.json against the one text that the edits, and the record's base, allow."""
    path = adapter / ADAPTER_CONFIG
    if not path.is_file():
        findings.fault(f"{ADAPTER_CONFIG} is missing.")
        return
    text = path.read_bytes()
    try:
        if record is not None:
            base, revision = record.model.id, record.model.revision
        else:
            base, revision = _base_claimed(text)
    except (ValueError, RecursionError):
        findings.fault(f"{ADAPTER_CONFIG} does not name a base.")
        return
    rank = max((edit.k for edit in edits), default=0)
    if text != adapter_config(base, revision, modules=modules, rank=rank).encode():
        findings.fault(f"{ADAPTER_CONFIG} is not the one that {EDITS} asks for.")


def _record_in(checkpoint: Path) -> RunRecord | None:
    """The record of a checkpoint, which `verify` has read; None without one."""
    path = checkpoint / RECORD
    return RunRecord.model_validate_json(read_text(path)) if path.is_file() else None


def _base_claimed(config: bytes) -> tuple[str, str | None]:
    """Name and commit of the base that adapter_config.json states."""
    claimed = json.loads(config)
    if not isinstance(claimed, dict):
        raise ValueError("not an object")
    base, revision = claimed.get("base_model_name_or_path"), claimed.get("revision")
    if not isinstance(base, str) or not isinstance(revision, (str, type(None))):
        raise ValueError("no base")
    return base, revision


def _read_tensors(adapter: Path, findings: Findings) -> dict[str, Tensor]:
    """The tensors of the adapter; a fault if its file is unreadable or holds anything else."""
    from safetensors import SafetensorError
    from safetensors.torch import load, save

    path = adapter / ADAPTER_WEIGHTS
    if not path.is_file():
        findings.fault(f"{ADAPTER_WEIGHTS} is missing.")
        return {}
    data = path.read_bytes()
    try:
        tensors: dict[str, Tensor] = load(data)
    except (SafetensorError, ValueError):
        findings.fault(f"{ADAPTER_WEIGHTS} is no sound safetensors file.")
        return {}
    if save(tensors, metadata=ADAPTER_METADATA) != data:
        findings.fault(f"{ADAPTER_WEIGHTS} holds more than its tensors.")
    return tensors


def _factors(
    edit: TensorEdit, module: str, tensors: Mapping[str, Tensor], findings: Findings
) -> tuple[Tensor, Tensor] | None:
    """A [k, in] and B [out, k] of one edit in float64; a fault, and None, where they do not fit."""
    import torch

    wide, tall = edit.shape[1], edit.shape[0]
    factors = []
    for name, shape in zip(adapter_tensors(module), ((edit.k, wide), (tall, edit.k)), strict=True):
        tensor = tensors.get(name)
        if tensor is None or tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
            findings.fault(f"{ADAPTER_WEIGHTS} has no {name} of {list(shape)} in float32.")
            return None
        factors.append(tensor.double())
    return factors[0], factors[1]


class _Sums(NamedTuple):
    """Norms (Frobenius) of one module: of W' - (W + B A), and of what they are measured by."""

    apart: float
    rounding: float  # of W + B A rounded to the stored type
    factors: float  # |A| |B|
    wrote: float  # |(D Q)ᵀ W|
    writes: float  # |(D Q)ᵀ (W + B A)|
    reads: float  # |D Q|


def _compare(edit: TensorEdit, sums: _Sums, findings: Findings) -> None:
    """One module, merged: against the stored bytes, and against its strength."""
    if not is_rounding(sums.apart, sums.rounding, sums.factors):
        findings.fault(
            f"{edit.name}: base and adapter give weights that are {sums.apart:.1e} from the "
            f"checkpoint's; rounding explains {sums.rounding:.1e}."
        )
    if sums.rounding > 0:
        findings.apart.append(sums.apart / sums.rounding)
    if sums.wrote == 0:  # or not measured
        return
    findings.leaks.append(sums.writes / sums.wrote)
    left = abs(1 - edit.strength) * sums.wrote
    if not abs(sums.writes - left) <= FACTORS * sums.reads * sums.factors:
        findings.fault(
            f"{edit.name}: base and adapter have a leak of {sums.writes / sums.wrote:.2e}; its "
            f"strength, {edit.strength:g}, leaves {abs(1 - edit.strength):.2e}."
        )


def _measured(
    edit: TensorEdit,
    sides: tuple[Checkpoint, Checkpoint],
    factors: tuple[Tensor, Tensor],
    reads: Tensor | None,
) -> _Sums:
    from abliterator.subspace import column_ranges

    fmt: Format = FORMATS[edit.dtype]
    before, after = (fmt.view(bytearray(side.read(edit.name)), edit.shape) for side in sides)
    a, b = factors
    squares = [0.0] * 4
    for start, end in column_ranges(edit.shape[1], max(1, PANEL_ELEMENTS // edit.shape[0])):
        weight = before[:, start:end].double()
        merged = weight + b @ a[:, start:end]
        terms = [after[:, start:end].double() - merged, fmt.rounded(merged) - merged]
        terms += [] if reads is None else [reads.T @ weight, reads.T @ merged]
        for i, term in enumerate(terms):
            squares[i] += float(term.square().sum())
    apart, rounding, wrote, writes = (square**0.5 for square in squares)
    through = 0.0 if reads is None else float(reads.norm())
    return _Sums(apart, rounding, float(a.norm() * b.norm()), wrote, writes, through)
