"""Measures what quantisation leaves of a finished build: a stage a format, then record and card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from abliterator.errors import OutputError
from abliterator.files import free_bytes
from abliterator.pipeline._options import Options
from abliterator.pipeline._progress import Progress
from abliterator.pipeline._resume import prepare, run_missing
from abliterator.pipeline._run import Run
from abliterator.pipeline._survival._session import SurvivalSession
from abliterator.pipeline._workspace import Workspace, usable
from abliterator.pipeline.stages import stages_of
from abliterator.pipeline.stages.card import CARD
from abliterator.pipeline.stages.divergence import answer_paths
from abliterator.pipeline.stages.record import RECORD, read_record
from abliterator.record import Survival
from abliterator.survival import (
    LlamaCpp,
    QuantizedFormat,
    find_llama_cpp,
    formats_named,
    require_package,
    require_plain,
    rounding_of,
)

_RESERVE = 64 << 20  # bytes left free


@dataclass(frozen=True)
class SurvivalSettings:
    """What is measured of a finished build.

    Attributes:
        formats: their names.
        limit: prompts of each set at most; None for all of the build's.
        llama_cpp: folder of llama.cpp; None for its programs on PATH.
        keep: keep the quantised files in OUT/work/survival/files.
    """

    formats: tuple[str, ...]
    limit: int | None = None
    llama_cpp: Path | None = None
    keep: bool = False


def survive(
    out: Path,
    settings: SurvivalSettings,
    *,
    options: Options | None = None,
    progress: Progress | None = None,
) -> tuple[Survival, ...]:
    """Measures formats of base and edited that are not measured yet; returns all that are asked.

    The record and the card of `out` have them from then on, as long as the build is the same.

    Args:
        out: folder of a finished build.
        settings: what is measured.
        options: device and dtype.
        progress: notified of stages and of work done.

    Raises:
        RecipeError: for a format that is not known.
        QuantizationError: for a tool that is not installed, and what a tool refuses.
        OutputError: for a build that is not finished, and a disk that is too small.
    """
    entries = formats_named(settings.formats)
    tools = _require_tools(entries, settings)
    recipe = Workspace(out).recipe()
    with usable(out):
        run = prepare(recipe, out, options, progress)
        _require_finished(run)
        _require_fit(run, entries)
        _require_room(run, entries, settings)
    session = SurvivalSession(run, tools, settings.limit, keep=settings.keep)
    stages = [session.stage(entry) for entry in entries]
    try:
        run_missing(run, recipe, (*stages, RECORD, CARD), keep_from=None)
    finally:
        session.clean()
    names = {entry.name for entry in entries}
    return tuple(entry for entry in read_record(out).survival if entry.format in names)


def _require_tools(
    entries: Sequence[QuantizedFormat], settings: SurvivalSettings
) -> LlamaCpp | None:
    tools = {entry.tool for entry in entries}
    if "compressed-tensors" in tools:
        require_package()
    return find_llama_cpp(settings.llama_cpp) if "llama.cpp" in tools else None


def _require_fit(run: Run, entries: Sequence[QuantizedFormat]) -> None:
    """Raises QuantizationError for a model that a format cannot store."""
    require_plain(run.plan.checkpoint)
    for entry in entries:
        if entry.tool == "compressed-tensors":
            rounding_of(run.plan.checkpoint, entry)


def _require_finished(run: Run) -> None:
    """Raises OutputError unless every stage of the build before its record is done."""
    for stage in stages_of(run.recipe):
        if stage in (RECORD, CARD):
            continue
        marker = run.workspace.marker(stage.name)
        if marker is None or not run.workspace.is_done(stage.name, stage.key(run)):
            raise OutputError(
                f"{run.workspace.out} is not finished: its stage `{stage.name}` "
                f"{'is missing' if marker is None else 'was made from something else'}. Give "
                f"`abliterator build {run.workspace.out}` first, with the same --dtype."
            )


def _require_room(run: Run, entries: Sequence[QuantizedFormat], settings: SurvivalSettings) -> None:
    """Raises OutputError where the disk has no room for the largest files at one time."""
    size = run.plan.checkpoint.total_bytes
    copies = 2 + (2 * len(entries) if settings.keep else 0)  # a format, and its numbers
    copies += 2 if any(entry.tool == "llama.cpp" for entry in entries) else 0
    positions = sum(path.positions for path in answer_paths(run)[: settings.limit])
    vocabulary = max((info.shape[0] for info in run.plan.checkpoint.tensors.values()), default=0)
    needed = copies * size + 3 * 4 * positions * vocabulary + _RESERVE  # and float32 logits
    if (free := free_bytes(run.workspace.work)) < needed:
        raise OutputError(
            f"Quantised forms, their numbers and distributions take {needed / 1e9:.1f} GB for a "
            f"while, and the disk of {run.workspace.out} has {free / 1e9:.1f} GB free. Make room, "
            "or measure fewer prompts (`--limit`), one format at a time."
        )
