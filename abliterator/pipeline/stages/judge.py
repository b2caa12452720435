"""Verdicts on the answers of base and edited.

The stage writes work/verdicts.jsonl, work/sample_verdicts.jsonl where answers were drawn too, and
the identity of the judge to work/judge.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from abliterator.pipeline._judges import evaluation_judge, note_plain_http
from abliterator.pipeline._progress import Progress
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Artefact, Stage
from abliterator.pipeline.stages.rollouts import ANSWERS, SAMPLES
from abliterator.record import Completion, JudgeIdentity, SampledCompletion, SampledVerdict, Verdict

VERDICTS = Artefact("judge", "work/verdicts.jsonl")  # base and edited
SAMPLE_VERDICTS = Artefact("judge", "work/sample_verdicts.jsonl")  # on drawn answers, if there are
IDENTITY = Artefact("judge", "work/judge.json")  # the judge, its calibration and usage


def _key(run: Run) -> Any:
    return [
        run.digest("rollouts"),
        run.recipe.published()["judge"],
        evaluation_judge(run).identity.model_dump(mode="json"),
    ]


def _run(run: Run) -> list[Path]:
    from abliterator.judge import judge_completions

    answers = ANSWERS.read_lines(run, Completion)
    samples = run.recipe.rollouts.samples
    drawn = SAMPLES.read_lines(run, SampledCompletion) if samples else []
    note_plain_http(run.recipe.judge, run.progress)
    with run.progress.bar("verdicts", len(answers) + len(drawn)) as advance:
        judge = evaluation_judge(run, lambda tally: advance(1, status=str(tally)))
        judged = judge_completions([*answers, *drawn], judge)
    verdicts, of_drawn = judged[: len(answers)], judged[len(answers) :]
    identity = _with_disagreement(judge.identity, answers, verdicts)
    _note_quality(run.progress, identity, judged)
    written = [VERDICTS.write_lines(run, verdicts), IDENTITY.write(run, identity)]
    if samples:
        lines = zip(drawn, of_drawn, strict=True)
        numbered = [SampledVerdict(**v.model_dump(), sample=c.sample) for c, v in lines]
        written.append(SAMPLE_VERDICTS.write_lines(run, numbered))
    return written


def _with_disagreement(
    identity: JudgeIdentity, answers: Sequence[Completion], verdicts: Sequence[Verdict]
) -> JudgeIdentity:
    """The judge, with how often the rules disagree with it."""
    from abliterator.judge import RuleJudge, disagreement, judge_completions

    disagreements = dict(identity.disagreement)
    if identity.kind != "rules":
        by_rules = judge_completions(answers, RuleJudge())
        if (rate := disagreement(by_rules, verdicts)) is not None:
            disagreements["rules"] = rate
    return identity.model_copy(update={"disagreement": disagreements})


def _note_quality(progress: Progress, identity: JudgeIdentity, verdicts: Sequence[Verdict]) -> None:
    """Notes unscored answers, disagreement and cost; nothing for the rule judge."""
    from abliterator.judge import counted, unscored_reasons

    reasons = unscored_reasons(verdicts)
    if reasons:
        n = sum(reasons.values())
        progress.note(f"{n} of {len(verdicts)} answers are unscored: {counted(reasons)}")
    for other, rate in identity.disagreement.items():
        compared_with = "itself, asked again," if other == "itself" else f"the judge `{other}`"
        progress.note(
            f"The judge disagrees with {compared_with} on {rate.value:.1%} of the answers "
            f"({rate.counts} were scored)."
        )
    if identity.usage:
        spent = ", ".join(f"{value:g} {name}" for name, value in identity.usage.items())
        progress.note(f"The judge's calls of this folder: {spent}.")


JUDGE = Stage("judge", 5, _key, _run)
