"""The same measurements on any two checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from abliterator.benchmarks import RunSettings, Subject, Task, compare_tasks, measure_sides
from abliterator.checkpoint import Checkpoint, fingerprint
from abliterator.comparison._divergence import (
    Bar,
    DivergenceSettings,
    measure_divergence,
    no_bar,
)
from abliterator.comparison._result import Comparison
from abliterator.comparison._weights import diff_weights
from abliterator.judge import Judge, RuleJudge, judge_completions, summarise
from abliterator.record import (
    Behaviour,
    BenchmarkResult,
    Completion,
    Divergence,
    Side,
)

if TYPE_CHECKING:
    from abliterator.model import LoadedModel


@dataclass(frozen=True)
class CompareSettings:
    """What is measured, and how.

    Attributes:
        prompts: sets that both sides answer, by name ("target", "neutral"); divergence is measured
            on "neutral".
        tasks: benchmarks, from `resolve_tasks`.
        max_new_tokens: tokens of an answer.
        divergence: how divergence is measured.
        benchmarks: how benchmarks are run; device and dtype are those of all measurements.
    """

    prompts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    tasks: Sequence[Task] = ()
    max_new_tokens: int = 256
    divergence: DivergenceSettings = field(default_factory=DivergenceSettings)
    benchmarks: RunSettings = field(default_factory=RunSettings)


def compare(
    base: Path,
    edited: Path,
    settings: CompareSettings,
    judge: Judge | None = None,
    *,
    scratch: Path,
    bar: Bar = no_bar,
) -> Comparison:
    """Weights always, straight from the files; answers, divergence and benchmarks as asked for.

    One model is in memory at a time.

    Args:
        base: checkpoint folder.
        edited: checkpoint folder.
        settings: what is measured.
        judge: of the answers; left out, the rule judge.
        scratch: an empty folder; what is left there can be deleted.
        bar: shows progress.

    Raises:
        AbliteratorError: if a checkpoint is damaged, or one cannot be measured.
    """
    checkpoints: dict[Side, Checkpoint] = {
        "base": Checkpoint.open(base),
        "edited": Checkpoint.open(edited),
    }
    judge = judge or RuleJudge()
    weights = diff_weights(checkpoints["base"], checkpoints["edited"])
    models = _OneAtATime({"base": base, "edited": edited}, settings.benchmarks)
    behaviour = _behaviour(models.load, settings, judge, bar)
    divergence = _divergence(models.load, settings, scratch=scratch, bar=bar)
    models.free()
    return Comparison(
        base=base.name,
        edited=edited.name,
        weights=weights,
        behaviour=behaviour,
        judge=judge.identity if behaviour else None,
        divergence=divergence,
        benchmarks=_benchmarks(checkpoints, settings, scratch=scratch, bar=bar),
    )


class _OneAtATime:
    """Loads either side, and lets go of the other first."""

    def __init__(self, folders: Mapping[Side, Path], settings: RunSettings) -> None:
        self._folders, self._settings = folders, settings
        self._held: tuple[Side, LoadedModel] | None = None

    def load(self, side: Side) -> LoadedModel:
        from abliterator.model import load_model

        if self._held is None or self._held[0] != side:
            self.free()
            loaded = load_model(
                self._folders[side], device=self._settings.device, dtype=self._settings.dtype
            )
            self._held = (side, loaded)
        return self._held[1]

    def free(self) -> None:
        if self._held is None:
            return
        from abliterator.model import release_memory

        self._held = None
        release_memory()


def _behaviour(
    load: Callable[[Side], LoadedModel], settings: CompareSettings, judge: Judge, bar: Bar
) -> dict[str, Behaviour]:
    """Both sides' answers to every prompt set, judged."""
    if not settings.prompts:
        return {}
    sides: tuple[Side, Side] = ("base", "edited")
    answers = [found for side in sides for found in _answers(load(side), side, settings, bar)]
    verdicts = judge_completions(answers, judge)
    return {
        name: summarise(
            *([v for v in verdicts if (v.set, v.side) == (name, side)] for side in sides),
            seed=settings.divergence.seed,
        )
        for name in settings.prompts
    }


def _answers(
    loaded: LoadedModel, side: Side, settings: CompareSettings, bar: Bar
) -> list[Completion]:
    from abliterator.generation import answer_sets

    return answer_sets(
        loaded,
        {name: (asked, _rendered(loaded, asked)) for name, asked in settings.prompts.items()},
        side=side,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.divergence.batch_size,
        bar=bar,
    )


def _rendered(loaded: LoadedModel, prompts: Sequence[str]) -> list[list[int]]:
    from abliterator.model import render_chat

    return [render_chat(loaded.tokenizer, prompt) for prompt in prompts]


def _divergence(
    load: Callable[[Side], LoadedModel], settings: CompareSettings, *, scratch: Path, bar: Bar
) -> Divergence | None:
    neutral = settings.prompts.get("neutral")
    if not neutral:
        return None
    return measure_divergence(
        load,
        lambda loaded: _rendered(loaded, neutral),
        settings.divergence,
        scratch=scratch / "base_logits.bin",
        bar=bar,
    )


def _benchmarks(
    checkpoints: Mapping[Side, Checkpoint], settings: CompareSettings, *, scratch: Path, bar: Bar
) -> dict[str, BenchmarkResult]:
    if not settings.tasks:
        return {}
    subjects = {
        side: Subject(checkpoint.folder, str(fingerprint(checkpoint)))
        for side, checkpoint in checkpoints.items()
    }
    with bar("benchmark tasks, both sides", 2 * len(settings.tasks)) as advance:
        scores = measure_sides(
            subjects,
            settings.tasks,
            settings.benchmarks,
            out=scratch / "benchmarks",
            on_task=lambda side, task: advance(1),
        )
    return compare_tasks(scores["base"], scores["edited"], seed=settings.divergence.seed)
