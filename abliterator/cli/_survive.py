"""`abliterator survive`: what quantisation leaves of an edit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from abliterator.cli._options import FOLDER, JSON, computing_arguments
from abliterator.cli._terminal import Bars, show
from abliterator.tables import cell, terminal_table

if TYPE_CHECKING:
    from abliterator.record import Behaviour, Divergence, Survival


@click.command(short_help="Measure what quantisation leaves of an edit.")
@click.argument("out", type=FOLDER)
@click.option(
    "--as",
    "formats",
    default="fp8,int4,Q4_K_M,Q8_0",
    show_default=True,
    help="Formats between commas: fp8, int8, int4, nvfp4, or types of llama.cpp.",
)
@click.option(
    "--limit", type=click.IntRange(1), help="Prompts of each set at most.  [default: the build's]"
)
@click.option(
    "--llama-cpp",
    type=FOLDER,
    help="A clone of llama.cpp that was built.  [default: its programs on PATH]",
)
@click.option("--keep", is_flag=True, help="Keep the quantised files, in OUT/work/survival/files.")
@computing_arguments
@JSON
def survive(
    out: Path,
    formats: str,
    limit: int | None,
    llama_cpp: Path | None,
    keep: bool,
    device: str,
    dtype: str,
    max_memory: int | None,
    as_json: bool,
) -> None:
    """Measure what quantisation leaves of the edit in OUT, the folder of a finished build.

    Base and edited are quantised to each format, and measured as the build was: refusal, compliance
    and coherence on its target prompts, divergence on its neutral ones, and the strength of the
    edit in the stored numbers. fp8, int8, int4 and nvfp4 are rounded to nearest by
    compressed-tensors (pip install 'abliterator[survive]'); GGUF types such as Q4_K_M are made by
    llama.cpp, whose server answers.
    The card then has the tables. Formats that were measured are not measured again.
    """
    from abliterator import pipeline

    settings = pipeline.SurvivalSettings(tuple(formats.split(",")), limit, llama_cpp, keep)
    options = pipeline.Options(device, dtype, max_memory)
    measured = pipeline.survive(out, settings, options=options, progress=Bars())
    show(list(measured), lambda _: survival_text(measured), as_json=as_json)


def survival_text(measured: Sequence[Survival]) -> str:
    """A row a format, below one of what was built; then what is left of the strengths."""
    rows = [["", "size, GB", "refusal", "", "compliance", "coherence", "KL(base,", "KL(built,"]]
    rows.append(["", "", "base", "edited", "edited", "edited", "edited)", "edited)"])
    for entry in measured:
        if entry.built != measured[0].built or entry is measured[0]:
            rows.append(_row("as built", entry.bytes_built, entry.built, None, None))
        rounding = entry.rounding.get("edited")
        rows.append(_row(entry.format, entry.bytes, entry.behaviour, entry.divergence, rounding))
    lines = terminal_table(rows)
    parts = [["", "component", "strength", "as built", "leak", "as built"]]
    for entry in measured:
        for part in entry.strengths:
            strength = f"{part.median:.3f} ({part.low:.3f} to {part.high:.3f})"
            leaks = f"{part.leak:.2g}", f"{part.leak_built:.2g}"
            parts.append([entry.format, part.component, strength, f"{part.built:.3f}", *leaks])
    return "\n".join([*lines, "", *terminal_table(parts)])


def _row(
    name: str,
    n_bytes: int,
    behaviour: Behaviour,
    divergence: Divergence | None,
    rounding: Divergence | None,
) -> list[str]:
    edited = behaviour.edited
    grades = (behaviour.base.refusal, edited.refusal, edited.compliance, edited.coherence)
    kls = [side.kl if side else None for side in (divergence, rounding)]
    values = [estimate.value if estimate else None for estimate in (*grades, *kls)]
    return [name, f"{n_bytes / 1e9:.2f}", *(cell(value, ".3f", absent="n/a") for value in values)]
