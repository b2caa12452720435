"""What was measured of base and edited, summed up for the record."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from abliterator.pipeline._run import Run
from abliterator.pipeline.stages.benchmarks import task_scores
from abliterator.pipeline.stages.judge import SAMPLE_VERDICTS
from abliterator.pipeline.stages.prompts import prompt_sets
from abliterator.pipeline.stages.rollouts import ANSWERS, SIDES, engines_of
from abliterator.record import (
    Behaviour,
    BenchmarkResult,
    Completion,
    ConfidenceFigure,
    Grouping,
    PairedFigure,
    SampledAnswers,
    SampledVerdict,
    SideEffect,
    Verdict,
)


def behaviour_of(run: Run, verdicts: Sequence[Verdict]) -> dict[str, Behaviour | None]:
    """Summaries of the verdicts by prompt set; None for a set that was not answered."""
    from abliterator.judge import summarise

    summaries: dict[str, Behaviour | None] = {"target": None, "neutral": None, "over_refusal": None}
    for name in prompt_sets(run).evaluation:
        sides, clusters = _sides(verdicts, name), _clusters(run, name)
        summaries[name] = summarise(*sides, clusters=clusters, seed=run.recipe.seed)
    return summaries


def _clusters(run: Run, name: str) -> list[Hashable] | None:
    """The cluster of each evaluation prompt, where the recipe names a column of them."""
    clusters = prompt_sets(run).evaluation[name].clusters
    return [i if cluster is None else cluster for i, cluster in enumerate(clusters)] or None


def sampled_answers(run: Run) -> SampledAnswers | None:
    """The drawn answers; those to one prompt, or to prompts of one cluster, are a cluster."""
    from abliterator.judge import summarise

    settings, engine = run.recipe.rollouts, run.recipe.engine.kind
    if not (samples := settings.samples):
        return None
    numbered = [
        verdict.model_copy(update={"index": verdict.index * samples + verdict.sample})
        for verdict in SAMPLE_VERDICTS.read_lines(run, SampledVerdict)
    ]
    behaviour = {}
    for name, prompts in prompt_sets(run).evaluation.items():
        of_prompts = _clusters(run, name) or range(len(prompts.prompts))
        behaviour[name] = summarise(
            *_sides(numbered, name),
            clusters=[cluster for cluster in of_prompts for _ in range(samples)],
            seed=run.recipe.seed,
        )
    by = engines_of(run)
    return SampledAnswers(
        **settings.model_dump(include={"samples", "temperature", "top_p", "seed"}),
        sampler={side: engine if side in by else "process" for side in SIDES},
        behaviour=behaviour,
    )


def groupings_of(run: Run, verdicts: Sequence[Verdict]) -> dict[str, tuple[Grouping, ...]]:
    """Verdicts by group, of the sets whose prompts have groups."""
    from abliterator.groups import group_verdicts

    groups = {
        name: group_verdicts(
            *_sides(verdicts, name),
            prompts.groups,
            clusters=_clusters(run, name),
            seed=run.recipe.seed,
        )
        for name, prompts in prompt_sets(run).evaluation.items()
    }
    return {name: groupings for name, groupings in groups.items() if groupings}


def _sides(verdicts: Sequence[Verdict], name: str) -> tuple[list[Verdict], list[Verdict]]:
    """The verdicts of one prompt set on base and edited."""
    of_set = [verdict for verdict in verdicts if verdict.set == name]
    return [v for v in of_set if v.side == "base"], [v for v in of_set if v.side == "edited"]


def benchmark_results(run: Run) -> dict[str, BenchmarkResult]:
    """Results by benchmark task."""
    from abliterator.benchmarks import compare_tasks

    if not run.tasks:
        return {}
    return compare_tasks(task_scores(run, "base"), task_scores(run, "edited"), seed=run.recipe.seed)


def side_effects_of(run: Run) -> dict[str, dict[SideEffect, PairedFigure]]:
    """Length, language and agreement of the answers, by prompt set."""
    from abliterator.side_effects import side_effects

    answers = ANSWERS.read_lines(run, Completion)
    figures = {}
    for name in prompt_sets(run).evaluation:
        of_set = [answer for answer in answers if answer.set == name]
        base, edited = ([a for a in of_set if a.side == side] for side in SIDES)
        figures[name] = side_effects(base, edited)
    return figures


def confidence_of(run: Run) -> dict[str, dict[ConfidenceFigure, PairedFigure]]:
    """Confidence against accuracy of the benchmark tasks whose choices have probabilities."""
    from abliterator.side_effects import confidence_figures

    if not run.tasks:
        return {}
    base, edited = (task_scores(run, side) for side in SIDES)
    figures = {task: confidence_figures(scores, edited[task]) for task, scores in base.items()}
    return {task: figure for task, figure in figures.items() if figure is not None}
