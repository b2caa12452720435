"""vLLM as the engine of a run: which interpreter has it, and one server at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterator.diagnostics import VllmInstall, find_vllm
from abliterator.errors import BenchmarkError
from abliterator.files import digest_of
from abliterator.pipeline._run import Run
from abliterator.recipe import Recipe
from abliterator.record import Side

if TYPE_CHECKING:
    from abliterator.engines import ServedEngine


def vllm_of(recipe: Recipe, python: str | None) -> VllmInstall | None:
    """The vLLM that will answer; None where the recipe has another engine.

    Args:
        recipe: its `engine` is read.
        python: the interpreter that has it, instead of the recipe's.

    Raises:
        GenerationError: if there is none.
    """
    if recipe.engine.kind != "vllm":
        return None
    return find_vllm(python or recipe.engine.python)


def vllm_note(install: VllmInstall) -> str:
    """What a plan says of the vLLM that will answer."""
    build = "a build for CPUs" if install.on_cpu else "a build for accelerators"
    return f"Answers come from vLLM {install.version} ({build}), run by {install.python}."


def vllm_engine(run: Run, folder: Path, side: Side, *, candidates: bool) -> ServedEngine:
    """The engine of a checkpoint that vLLM serves.

    Args:
        run: the run.
        folder: the checkpoint.
        side: base or edited.
        candidates: whether it is asked under edits too, which then are adapters.
    """
    from abliterator.engines import CompletionClient, ServedEngine, VllmModel, slots_for
    from abliterator.engines import VllmCheckpoint as Served
    from abliterator.model import load_tokenizer

    install, settings = run.vllm, run.recipe.engine
    assert install is not None
    slots = slots_for(run.plan.edits, _largest_rank(run)) if candidates else None
    trusted, work = run.recipe.trust_remote_code, run.workspace.work
    bake = run.digest("bake") if side == "edited" else None
    tokenizer = load_tokenizer(folder, trust_remote_code=trusted)
    client = CompletionClient(
        settings.server(side, model=side), tokenizer, cache=work / "answers.sqlite"
    )
    served = VllmModel(
        install,
        Served(folder, side, run.dtype, trusted, slots, is_beside=candidates),
        settings,
        digest_of([run.base_digest(), bake, *depends_on(run)]),
        client,
        log=work / "vllm.log",
        scratch=work / "vllm",
        note=run.progress.note,
        bakes_edits=cache(lambda: run.is_beyond_memory(folder)),
    )
    return ServedEngine(
        folder,
        tokenizer,
        served,
        passes=lambda: run.engine(folder),
        trust_remote_code=trusted,
        note=run.progress.note,
    )


@contextmanager
def served_by_vllm(run: Run, folder: Path, side: Side) -> Iterator[str]:
    """The address of the server of a side, for as long as the context is open.

    Raises:
        ServerError: for a server that does not start, or that ended meanwhile.
    """
    from abliterator.engines import ServedEngine, VllmModel

    engine = run.answering(folder, side)
    assert isinstance(engine, ServedEngine)
    assert isinstance(engine.served, VllmModel)
    try:
        yield engine.served.base_url
    except BenchmarkError:
        engine.served.require_running()
        raise


def depends_on(run: Run) -> list[Any]:
    """What answers and scores depend on beside checkpoint and prompt, in a stage's key."""
    assert run.vllm is not None
    return [run.vllm.version, run.dtype, run.recipe.engine.affecting_answers()]


def _largest_rank(run: Run) -> int:
    """The largest number of directions that a candidate of the run removes."""
    recipe = run.recipe
    k = recipe.selection.stacks if recipe.k == "auto" else [recipe.k]
    return max(k)
