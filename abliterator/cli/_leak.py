"""`abliterator leak`: how strongly a subspace was removed from any checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from abliterator.cli._options import FILE, JSON, checkpoint_folder, computing_arguments
from abliterator.cli._terminal import Bars, show
from abliterator.tables import cell, terminal_table

if TYPE_CHECKING:
    from torch import Tensor

    from abliterator.model import LoadedModel
    from abliterator.record import EffectiveStrength


@click.command(short_help="Measure how strongly anybody removed a subspace.")
@click.argument("base")
@click.argument("edited")
@click.option(
    "--subspace",
    type=FILE,
    required=True,
    help="Safetensors file with a tensor `subspace` [d_model, k], or [n_layers, d_model, k].",
)
@click.option("--run", is_flag=True, help="Also run both models, and measure what blocks write.")
@computing_arguments
@JSON
def leak(
    base: str,
    edited: str,
    subspace: Path,
    run: bool,
    device: str,
    dtype: str,
    max_memory: int | None,
    as_json: bool,
) -> None:
    """Measure how strongly a subspace was removed from EDITED, whoever edited it.

    BASE and EDITED are Hub ids or folders, in any storage format that abliterator reads. The
    effective strength of a block is 1 where the subspace was removed, 0 where it was left, and
    above 1 where it was inverted. *Within* is the share of the change that lies in the subspace.
    """
    from abliterator.directions import load_subspace
    from abliterator.verification import stored_strengths

    folders, basis = (checkpoint_folder(base), checkpoint_folder(edited)), load_subspace(subspace)
    bars = Bars()
    with bars.bar("writers", _bytes_of_writers(folders[1])) as advance:
        stored = stored_strengths(*folders, basis.basis, on_bytes=advance)
    measured: tuple[EffectiveStrength, ...] = ()
    if run:
        measured = _measured(folders, basis.basis, device, dtype, max_memory)
    show(
        {"stored": stored, "measured": measured},
        lambda _: _text(stored, measured),
        as_json=as_json,
    )


def _bytes_of_writers(folder: Path) -> int:
    from abliterator.anatomy import anatomy_of
    from abliterator.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(folder)
    writers = anatomy_of(checkpoint.config).writers(checkpoint.shapes)
    names = {writer.name for writer in writers} & checkpoint.tensors.keys()
    return sum(checkpoint.tensors[name].nbytes for name in names)


def _measured(
    folders: tuple[Path, Path], basis: Tensor, device: str, dtype: str, max_memory: int | None
) -> tuple[EffectiveStrength, ...]:
    """The strengths of whole blocks, from passes over the fixed text of the package."""
    from abliterator.checkpoint import Checkpoint
    from abliterator.evaluation import neutral_text
    from abliterator.model import load_model
    from abliterator.pipeline import Options
    from abliterator.verification import measured_strengths

    options = Options(device, dtype, max_memory)
    computed = options.compute_dtype(Checkpoint.open(folders[0]))

    def load(folder: Path) -> LoadedModel:
        return load_model(folder, **options.weights, dtype=computed)

    return measured_strengths(*folders, basis, neutral_text(), load=load)


def _text(stored: Sequence[EffectiveStrength], measured: Sequence[EffectiveStrength]) -> str:
    """A row a component of a block, and below it the range of each component."""
    rows = [["block", "writes", "strength", "leak", "within"]]
    for entry in (*stored, *measured):
        rows.append(
            [
                str(entry.layer) if entry.layer >= 0 else "-",
                entry.component,
                cell(entry.strength, ".4f", absent="writes nothing there"),
                cell(entry.leak, ".1e", absent="n/a"),
                cell(entry.change_within, ".3f", absent="unchanged"),
            ]
        )
    lines = terminal_table(rows)
    for component in dict.fromkeys(entry.component for entry in (*stored, *measured)):
        values = [
            entry.strength
            for entry in (*stored, *measured)
            if entry.component == component and entry.strength is not None
        ]
        if values:
            lines.append(f"{component}: strength {min(values):.4f} to {max(values):.4f}")
    return "\n".join(lines)
