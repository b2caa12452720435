"""What was measured of quantised forms of a build: work/survival/FORMAT.json, one a format.

`abliterator survive` measures them after a build. They are in the record, and so on the card, as
long as all that they depend on is as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from abliterator.errors import OutputError
from abliterator.pipeline._judges import evaluation_judge
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Artefact, Stage
from abliterator.record import Survival
from abliterator.survival import FORMATS

VERSION = 1


def survival_file(name: str) -> Artefact:
    """The figures of a format."""
    return Artefact(f"survival-{name}", f"work/survival/{name}.json")


def survival_stage(
    name: str, limit: int | None, work: Callable[[Run], Sequence[Path]] = lambda run: []
) -> Stage:
    """The stage that measures a format.

    Args:
        name: of the format.
        limit: prompts of each set at most; None for all of the build's.
        work: measures, and returns the file that it wrote; left out of a stage that only has a key.
    """
    inputs = partial(_inputs, name, limit)
    return Stage(survival_file(name).stage, VERSION, inputs, work, asks_model=True)


def _inputs(name: str, limit: int | None, run: Run) -> Any:
    stages = ("directions", "bake", "rollouts", "judge", "divergence")
    return [
        name,
        limit,
        run.base_digest(),
        {stage: run.digest(stage) for stage in stages},
        {section: run.section(section) for section in ("chat", "rollouts", "divergence")},
        evaluation_judge(run).identity.model_dump(mode="json"),
        run.dtype,
    ]


def survived(run: Run) -> tuple[Survival, ...]:
    """What was measured of the present base and edit, in the order of `FORMATS`."""
    return tuple(_survived(run))


def _survived(run: Run) -> Iterator[Survival]:
    for entry in FORMATS:
        artefact = survival_file(entry.name)
        marker = run.workspace.marker(artefact.stage)
        if marker is None:
            continue
        try:
            measured = artefact.read_as(run, Survival)
        except (OutputError, ValueError):
            continue  # changed since, or of another version: it is measured again when asked for
        if marker.key == survival_stage(entry.name, measured.limit).key(run):
            yield measured
