"""config.json of the edited checkpoint.

A stage apart from `bake`: it names the whole recipe, and another judge must not bake again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from abliterator.bake import write_config
from abliterator.checkpoint import CONFIG_FILE
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Stage
from abliterator.pipeline.stages.bake import made_from
from abliterator.pipeline.stages.tuning import planned_edits


def _key(run: Run) -> Any:
    return [run.digest("bake"), made_from(run)]


def _run(run: Run) -> list[Path]:
    out = run.workspace.checkpoint
    write_config(run.plan.checkpoint, planned_edits(run), out, made_from(run))
    return [out / CONFIG_FILE]


CONFIG = Stage("config", 1, _key, _run)
