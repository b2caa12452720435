"""Several recipes built side by side, one a worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from abliterator.errors import AbliteratorError
from abliterator.pipeline._options import Options
from abliterator.pipeline.stages.benchmarks import key_names
from abliterator.processes import HUB_TOKENS
from abliterator.recipe import Recipe
from abliterator.record import RunRecord
from abliterator.workers import PoolSettings, Resident, open_pool


class Build(NamedTuple):
    """A recipe and the folder that it is built in."""

    recipe: Recipe
    out: Path


BuildFunction = Callable[[Recipe, Path, Options], RunRecord]


@dataclass(frozen=True)
class BuildJob:
    """Builds recipes in a worker, each with the model on the worker's own device."""

    build: BuildFunction
    options: Options

    @contextmanager
    def opened(self, resident: Resident) -> Iterator[Callable[[Build], str]]:
        """What builds a recipe, and returns its record as JSON."""
        options = replace(self.options, device=resident.device, ray=None, workers=None)
        yield lambda build: self.build(build.recipe, build.out, options).model_dump_json()


def build_on_workers(
    builds: Sequence[Build], settings: PoolSettings, options: Options, build: BuildFunction
) -> Iterator[RunRecord | AbliteratorError]:
    """The record of each build, in their order, or the error that ended it.

    A build whose worker dies goes on in another where it stopped; one that fails stops no other.

    Args:
        builds: in folders of their own, which all workers see.
        settings: of the workers; no more of them than builds are started.
        options: of every build.
        build: builds one recipe.

    Raises:
        WorkerError: if there is no room for the workers.
    """
    secrets = HUB_TOKENS | {"OPENAI_API_KEY"}
    secrets |= set().union(*(key_names(b.recipe.published()) for b in builds))
    few = settings.at_most(len(builds))
    with open_pool(replace(few, secrets=frozenset(secrets))) as pool:
        job = pool.number(BuildJob(build, options))
        whole = [Build(b.recipe, b.out.resolve()) for b in builds]
        for outcome in pool.outcomes(job, whole):
            try:
                yield RunRecord.model_validate_json(outcome.result())
            except AbliteratorError as error:
                yield error
