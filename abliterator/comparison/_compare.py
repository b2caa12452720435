"""Compares two checkpoints: files, weights, judged answers, divergence and benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterator.benchmarks import (
    RunSettings,
    ScoredCheckpoint,
    StoppedChild,
    Task,
    TaskScores,
    compare_tasks,
    measure_sides,
)
from abliterator.checkpoint import Checkpoint, fingerprint
from abliterator.comparison._beside import (
    Setup,
    differences,
    link_with_base_prompting,
    same_vocabulary,
)
from abliterator.comparison._markdown import OTHER_VOCABULARY, difference_line
from abliterator.comparison._models import SingleModelLoader
from abliterator.comparison._served import ServedSides
from abliterator.comparison._weights import diff_weights
from abliterator.devices import enough_memory
from abliterator.diagnostics import VllmInstall
from abliterator.engines import Engine, ServedEngine, require_two_models
from abliterator.errors import BenchmarkError
from abliterator.evaluation import (
    Bar,
    RenderedPrompts,
    answer_sets,
    answers_of,
    base_paths,
    measure_divergence,
    no_bar,
    score_conversations,
)
from abliterator.judge import Judge, RuleJudge, judge_completions, summarise
from abliterator.prompts import Prompt
from abliterator.recipe import EngineSettings
from abliterator.record import (
    Asking,
    Behaviour,
    BehaviourSide,
    Comparison,
    Completion,
    Difference,
    Divergence,
    Measurement,
    OwnScores,
    Side,
)

if TYPE_CHECKING:
    from abliterator.workers import Pool

SIDES: tuple[Side, Side] = ("base", "edited")


@dataclass(frozen=True)
class CompareSettings:
    """Prompt sets, tasks and settings of a comparison.

    Attributes:
        prompts: sets that both sides answer, by name ("target", "neutral"); divergence is measured
            on "neutral".
        tasks: benchmarks, from `resolve_tasks`.
        max_new_tokens: tokens of an answer.
        kl_tokens: answer tokens compared of each neutral prompt, at most.
        batch_size: prompts answered together; None for the engine's choice.
        max_batch_tokens: tokens in one forward pass of the divergence.
        seed: of the intervals.
        benchmarks: how benchmarks are run; device and dtype are those of all measurements.
        engine: what answers: this process, or a server that serves both sides.
        answers: file that caches the answers of a server; left out, they are kept nowhere.
        vllm: what runs vLLM, where that is the engine.
        pool: workers that hold the models, instead of this process; closed before benchmarks.
    """

    prompts: Mapping[str, Sequence[Prompt]] = field(default_factory=dict)
    tasks: Sequence[Task] = ()
    max_new_tokens: int = 256
    kl_tokens: int = 32
    batch_size: int | None = None
    max_batch_tokens: int = 4096
    seed: int = 0
    benchmarks: RunSettings = field(default_factory=RunSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    answers: Path | None = None
    vllm: VllmInstall | None = None
    pool: Pool | None = None


@enough_memory("The comparison", smaller="shorter answers (`--max-new-tokens`)")
def compare(
    base: Path,
    edited: Path,
    settings: CompareSettings,
    judge: Judge | None = None,
    *,
    scratch: Path,
    bar: Bar = no_bar,
    note: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Compares two checkpoints; without prompts and tasks, their files and weights alone.

    What differs beside the weights comes first. Where that is the chat template, the tokenizer or
    the stop tokens, both sides are prompted with the base's; where the same id is not the same
    token on both, each is prompted with its own, and no difference between them is computed. One
    model is in memory at a time.

    Args:
        base: checkpoint folder.
        edited: checkpoint folder.
        settings: what is measured.
        judge: of the answers; left out, the rule judge.
        scratch: an empty folder; what is left there can be deleted.
        bar: shows progress.
        note: called with each difference beside the weights, as a line, before any measurement.

    Raises:
        AbliteratorError: if a checkpoint is damaged, or one cannot be measured.
    """
    setups = Setup(Checkpoint.open(base)), Setup(Checkpoint.open(edited))
    beside = differences(*setups)
    for difference in beside:
        note(f"beside the weights: {difference_line(difference)}")
    prompting = _prompting(setups, beside)
    judge = judge or RuleJudge()
    served = None
    if settings.engine.kind != "transformers":
        cache = settings.answers or scratch / "answers.sqlite"
        dtype = settings.benchmarks.dtype
        served = ServedSides(
            setups, settings.engine, cache, settings.vllm, dtype, scratch=scratch, note=note
        )
    folders: dict[Side, Path] = {"base": base, "edited": edited}
    models = SingleModelLoader(
        folders, settings.benchmarks, prompting, served, settings.pool, note=note
    )
    with ExitStack() as stack:
        if served is not None:
            stack.callback(served.close)
        measured = _measured(setups, models, settings, judge, scratch=scratch, bar=bar)
    return Comparison(
        base=base.name,
        edited=edited.name,
        beside=beside,
        asked=prompting,
        engines=served.identities if served else {},
        **measured,
    )


def _measured(
    setups: tuple[Setup, Setup],
    models: SingleModelLoader,
    settings: CompareSettings,
    judge: Judge,
    *,
    scratch: Path,
    bar: Bar,
) -> dict[str, Any]:
    """Fields of a `Comparison` that are measured."""
    prompting = models.prompting
    _probe_server(models, settings)
    weights = diff_weights(setups[0].checkpoint, setups[1].checkpoint)
    withheld = _withheld(setups, settings, prompting)
    behaviour = _behaviour(models, settings, judge, bar)
    divergence = None
    if "divergence" not in withheld:
        divergence = _divergence(models, settings, scratch=scratch, bar=bar)
    conversations = _conversation_scores(models, settings, bar)
    models.free()
    benchmarks = {}
    if settings.tasks:
        scores = _benchmark_scores(setups, models, settings, scratch=scratch, bar=bar)
        scores = {side: {**conversations[side], **scores[side]} for side in SIDES}
        benchmarks = _benchmarks(scores, prompting, seed=settings.seed)
    return {
        "withheld": withheld,
        "weights": weights,
        "behaviour": behaviour,
        "judge": judge.identity if behaviour else None,
        "divergence": divergence,
        **benchmarks,
    }


_PROMPTING_PARTS = {"chat_template", "tokenizer", "stop_tokens", "generation_config"}


def _prompting(setups: tuple[Setup, Setup], beside: Sequence[Difference]) -> Asking:
    """How both sides are prompted, which what differs beside the weights decides."""
    if not _PROMPTING_PARTS & {difference.part for difference in beside}:
        return "alike"
    return "as_base" if same_vocabulary(*setups) else "apart"


def _withheld(
    setups: tuple[Setup, Setup], settings: CompareSettings, prompting: Asking
) -> dict[Measurement, str]:
    """The requested measurements without a difference between the sides, and the reason of each."""
    inputs: dict[Measurement, object] = {
        "behaviour": settings.prompts,
        "divergence": settings.prompts.get("neutral"),
        "benchmarks": settings.tasks,
    }
    if prompting == "apart":
        return {name: OTHER_VOCABULARY for name, value in inputs.items() if value}
    base, edited = (setup.logits for setup in setups)
    if base != edited and inputs["divergence"]:
        return {"divergence": f"the models predict over {base} and {edited} tokens"}
    return {}


def _behaviour(
    models: SingleModelLoader, settings: CompareSettings, judge: Judge, bar: Bar
) -> dict[str, Behaviour]:
    """Judged answers of both sides by prompt set; without a difference where prompts differ."""
    if not settings.prompts:
        return {}
    answers = [answer for side in SIDES for answer in _answers(models, side, settings, bar)]
    if judge.identity.kind == "local" and settings.pool is None:
        models.free()  # the judge needs the room
    verdicts = judge_completions(answers, judge)
    behaviours = {
        name: summarise(
            *([v for v in verdicts if (v.set, v.side) == (name, side)] for side in SIDES),
            seed=settings.seed,
        )
        for name in settings.prompts
    }
    if models.prompting != "apart":
        return behaviours
    no_difference = {
        "delta": BehaviourSide(**dict.fromkeys(BehaviourSide.model_fields)),
        "smallest_detectable": {},
        "p_value": {},
    }
    return {name: b.model_copy(update=no_difference) for name, b in behaviours.items()}


def _answers(
    models: SingleModelLoader, side: Side, settings: CompareSettings, bar: Bar
) -> list[Completion]:
    engine, limit = models.answering(side), settings.max_new_tokens
    rendered = {
        name: RenderedPrompts(prompts, _rendered(engine, prompts, name, limit))
        for name, prompts in settings.prompts.items()
    }
    models.probe(
        side, [ids for s in rendered.values() for ids in s.token_ids], max_new_tokens=limit
    )
    return answer_sets(
        engine,
        rendered,
        side=side,
        max_new_tokens=limit,
        batch_size=settings.batch_size,
        bar=bar,
        stop_ids=models.stop_ids,
        render=lambda name, prompts: _rendered(engine, prompts, name, limit),
    )


def _probe_server(models: SingleModelLoader, settings: CompareSettings) -> None:
    """Checks both models of a running server, hours before the second is needed."""
    if settings.engine.kind == "server" and settings.prompts:
        probed = []
        for side in SIDES:
            engine = models.answering(side)
            assert isinstance(engine, ServedEngine)
            limit = settings.max_new_tokens
            prompts = [
                ids
                for name, texts in settings.prompts.items()
                for ids in _rendered(engine, texts, name, limit)
            ]
            models.probe(side, prompts, max_new_tokens=limit)
            probed.append(engine.probed(max(prompts, key=len), max_new_tokens=limit))
        require_two_models(*probed)


def _rendered(
    engine: Engine, prompts: Sequence[Prompt], name: str, max_new_tokens: int
) -> list[list[int]]:
    from abliterator.model import render_prompts

    return render_prompts(
        engine.tokenizer, prompts, engine.limits, name=name, max_new_tokens=max_new_tokens
    )


def _divergence(
    models: SingleModelLoader, settings: CompareSettings, *, scratch: Path, bar: Bar
) -> Divergence | None:
    neutral = settings.prompts.get("neutral")
    if not neutral:
        return None
    tokens = settings.kl_tokens

    def rendered(engine: Engine) -> list[list[int]]:
        return _rendered(engine, neutral, "neutral", tokens)

    paths = base_paths(
        models.answering("base"),
        rendered(models.answering("base")),
        tokens=tokens,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        bar=bar,
    )
    return measure_divergence(
        models.load,
        rendered,
        paths,
        tokens=tokens,
        scratch=scratch / "base_logits.bin",
        max_batch_tokens=settings.max_batch_tokens,
        seed=settings.seed,
        bar=bar,
    )


def _conversation_scores(
    models: SingleModelLoader, settings: CompareSettings, bar: Bar
) -> dict[Side, dict[str, TaskScores]]:
    """Scores of both sides on the tasks of the conversation suite."""
    scores: dict[Side, dict[str, TaskScores]] = {side: {} for side in SIDES}
    run = settings.benchmarks
    for side, own in scores.items():
        for task in settings.tasks:
            if task.skill is not None:
                with bar(f"{side} answers, {task.name}", answers_of(task, run.section)) as advance:
                    own[task.name] = score_conversations(
                        models.answering(side),
                        task,
                        run.section,
                        run.chat,
                        settings={"dtype": run.dtype, "engine": settings.engine.kind},
                        stop_ids=models.stop_ids,
                        on_batch=advance,
                    )
    return scores


def _benchmark_scores(
    setups: tuple[Setup, Setup],
    models: SingleModelLoader,
    settings: CompareSettings,
    *,
    scratch: Path,
    bar: Bar,
) -> dict[Side, dict[str, TaskScores]]:
    tasks = [task for task in settings.tasks if task.skill is None]
    if not tasks:
        return {side: {} for side in SIDES}
    folders = [setup.folder for setup in setups]
    if models.prompting == "as_base":
        folders[1] = link_with_base_prompting(*setups, scratch / "edited")
    digests = [str(fingerprint(setup.checkpoint)) for setup in setups]
    with bar("benchmark tasks, both sides", 2 * len(tasks)) as advance:
        try:
            return measure_sides(
                dict(zip(SIDES, map(ScoredCheckpoint, folders, digests), strict=True)),
                tasks,
                settings.benchmarks,
                out=scratch / "benchmarks",
                on_task=lambda side, task: advance(1),
                serving=models.serving,
            )
        except BenchmarkError as error:
            # neither the folder of links nor the log need be there when this is read
            problem = error.problem if isinstance(error, StoppedChild) else str(error)
            problem = problem.replace(str(scratch / "edited"), str(setups[1].folder))
    raise BenchmarkError(problem)


def _benchmarks(
    scores: Mapping[Side, Mapping[str, TaskScores]], prompting: Asking, *, seed: int
) -> dict[str, Any]:
    """Fields of a `Comparison`: paired benchmark results, or each side's own scores."""
    if prompting != "apart":
        return {"benchmarks": compare_tasks(scores["base"], scores["edited"], seed=seed)}
    base, edited = (compare_tasks(side, side, seed=seed) for side in scores.values())
    apart = {
        name: OwnScores(metric=result.metric, base=result.base, edited=edited[name].base)
        for name, result in base.items()
        if name in edited
    }
    return {"benchmarks_apart": apart}
