"""The same edit as a LoRA beside the checkpoint, for recipes that ask for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from abliterator.bake import write_adapter
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Stage
from abliterator.pipeline.stages.directions import removed_subspace
from abliterator.pipeline.stages.tuning import planned_edits


def _key(run: Run) -> Any:
    return [run.digest("bake"), run.digest("directions"), run.base_id, run.plan.source.revision]


def _run(run: Run) -> list[Path]:
    written = write_adapter(
        run.plan.checkpoint,
        planned_edits(run),
        removed_subspace(run).basis,
        run.workspace.adapter,
        base_model=run.base_id,
        revision=run.plan.source.revision,
    )
    return list(written)


ADAPTER = Stage("adapter", 1, _key, _run)
