"""Which stages of a folder run, and which are kept from an earlier run.

A stage runs where its key or one of its files is not what its marker says. The Hub commits that the
first run of a recipe resolved are kept by the later ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

from abliterator.devices import enough_memory
from abliterator.errors import AbliteratorError, OutputError, RecipeError
from abliterator.pipeline._judges import judge_of
from abliterator.pipeline._local_judge import COMMIT, JudgeHost
from abliterator.pipeline._options import Options
from abliterator.pipeline._planning._plan import plan_source, require_room
from abliterator.pipeline._planning._prompt_lengths import require_prompts_fit
from abliterator.pipeline._progress import Progress, Silent
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Stage
from abliterator.pipeline._vllm import vllm_of
from abliterator.pipeline._workspace import Workspace, usable
from abliterator.pipeline.stages.benchmarks import (
    BENCHMARKS,
    benchmark_tasks,
    pin_tasks,
    probe_benchmarks,
)
from abliterator.pipeline.stages.rollouts import ROLLOUTS, probe_base
from abliterator.prompts import resolve_revision
from abliterator.recipe import Prompts, Recipe, Source
from abliterator.source import resolve_folder

_SMALLER = "smaller batches (`rollouts.batch_size`, `tuning.batch`)"


def run_missing(
    run: Run, requested: Recipe, stages: Sequence[Stage], *, keep_from: Stage | None
) -> None:
    """Runs each stage that is not done, in order.

    Args:
        run: what every stage gets.
        requested: the recipe as it was given.
        stages: those to run.
        keep_from: a new folder is deleted if a stage before this one fails; None keeps it.

    Raises:
        AbliteratorError: of a stage.
    """
    workspace = run.workspace
    with usable(workspace.out), workspace.held():
        workspace.create(requested, run.recipe)
        prompts_fit = False
        try:
            for stage in stages:
                key = stage.key(run)
                done = workspace.is_done(stage.name, key)
                if not (done or prompts_fit) and stage.asks_model:
                    require_prompts_fit(run)
                    if ROLLOUTS in stages:
                        probe_base(run)  # hours before it is needed
                    if BENCHMARKS in stages:
                        probe_benchmarks(run)
                    prompts_fit = True
                run.progress.stage(stage.name, done=done)
                if done:
                    continue
                start = perf_counter()
                with enough_memory(f"The stage `{stage.name}`", smaller=_SMALLER):
                    artefacts = stage.run(run)
                run.end_engine(candidates=True)
                seconds = round(perf_counter() - start, 3)
                _require_unchanged(stage, run, key)
                parts = stage.parts(run)
                workspace.finish(stage.name, key, artefacts, seconds=seconds, parts=parts)
        except AbliteratorError:
            run.end_engine()
            # leave no folder behind that looks like a result
            if keep_from is not None and workspace.marker(keep_from.name) is None:
                workspace.remove()
            raise
        finally:
            run.end_engine()
            run.free()


def _require_unchanged(stage: Stage, run: Run, key: str) -> None:
    if stage.key(run) != key:
        raise OutputError(
            f"What the stage `{stage.name}` depends on was changed while it ran: prompt files, for "
            "example. Give the same command again when they are at rest."
        )


def prepare(
    recipe: Recipe, out: Path, options: Options | None = None, progress: Progress | None = None
) -> Run:
    """The run of a recipe, after every check that needs no model; writes nothing.

    Raises:
        AbliteratorError: if recipe, model and folder do not fit together.
    """
    options, workspace = options or Options(), Workspace(out)
    device = options.compute_device
    if options.pool is not None:
        options.pool.require_room()
    resolved = workspace.claim(recipe, force=options.force)
    pinned_recipe = recipe if resolved is None else pinned(recipe, resolved)
    require_pinned_code(pinned_recipe)
    source = resolve_folder(pinned_recipe.model, revision=pinned_recipe.revision)
    plan = plan_source(source, pinned_recipe, out)
    vllm = vllm_of(pinned_recipe, options.vllm_python)
    require_room(plan, out)
    tasks = benchmark_tasks(pinned_recipe, device)
    # its calibration is read and a local model found; none is asked
    host = JudgeHost(options, plan.source)
    judge = judge_of(pinned_recipe.judge, cache=workspace.work, host=host)
    if resolved is None:
        pinned_recipe = pin_tasks(resolve(recipe, plan.source.revision), tasks)
        pinned_recipe = _with_judge(pinned_recipe, judge.identity.revision)
    return Run(pinned_recipe, plan, workspace, options, progress or Silent(), tasks, vllm)


def resolve(recipe: Recipe, revision: str | None) -> Recipe:
    """The recipe with every Hub revision as a commit, so that the same recipe means the same bytes.

    Args:
        recipe: as given.
        revision: the commit of the model, None for a local folder.

    Raises:
        PromptError: if a dataset's revision cannot be resolved.
    """

    def commit_of(name: str, source: Source) -> str | None:
        if source.dataset is None:
            return source.revision
        return resolve_revision(source.dataset, source.revision)

    prompts = _with_revisions(recipe.prompts, commit_of)
    return recipe.model_copy(update={"revision": revision, "prompts": prompts})


def _with_judge(recipe: Recipe, revision: str | None) -> Recipe:
    """The recipe with the commit of a local judge that is not the base."""
    if recipe.judge.kind != "local" or recipe.judge.is_base:
        return recipe
    judge = recipe.judge.model_copy(update={"revision": revision})
    return recipe.model_copy(update={"judge": judge})


def _with_revisions(prompts: Prompts, revision: Callable[[str, Source], str | None]) -> Prompts:
    """The section with a revision for each source, by its name."""
    return prompts.with_sources(
        {
            name: source.model_copy(update={"revision": revision(name, source)})
            for name, source in prompts.sources.items()
        }
    )


def pinned(recipe: Recipe, resolved: Recipe) -> Recipe:
    """The recipe with the commits that an earlier run of the same recipe resolved.

    All else is as given now: the digest of a recipe does not depend on where its files lie, and
    they may have been moved.
    """
    prompts = _with_revisions(
        recipe.prompts, lambda name, _: resolved.prompts.sources[name].revision
    )
    revisions = {"revisions": resolved.benchmarks.revisions}
    benchmarks = recipe.benchmarks.model_copy(update=revisions)
    changes = {"revision": resolved.revision, "prompts": prompts, "benchmarks": benchmarks}
    pinned_recipe = recipe.model_copy(update=changes)
    if recipe.judge.model != resolved.judge.model:
        return pinned_recipe
    return _with_judge(pinned_recipe, resolved.judge.revision)


def require_pinned_code(recipe: Recipe) -> None:
    """Raises RecipeError for remote code of a Hub model that no commit pins."""
    is_local = Path(recipe.model).is_dir() or ":" in recipe.model
    is_pinned = recipe.revision is not None and COMMIT.fullmatch(recipe.revision)
    if recipe.trust_remote_code and not is_local and not is_pinned:
        raise RecipeError(
            f"`trust_remote_code` would run code of {recipe.model} from the Hub, and no revision "
            f"pins it. Read the code, then give the commit you read: --set revision=<40 hex>."
        )
