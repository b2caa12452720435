"""The stage that judges the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterator.files import as_lines, read_lines, read_text, write_text_atomic
from abliterator.pipeline._progress import Progress
from abliterator.pipeline._rollouts import completions
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Parts, Stage, save_value
from abliterator.recipe import JudgeSettings
from abliterator.record import JudgeIdentity, Verdict

if TYPE_CHECKING:
    from abliterator.judge import Judge, Tally


def _judge_inputs(run: Run) -> Any:
    return [
        run.digest("rollouts"),
        run.recipe.published()["judge"],
        _judge_of(run).identity.model_dump(mode="json"),
    ]


def _judge_of(run: Run, on_verdict: Callable[[Tally], None] | None = None) -> Judge:
    cache = run.workspace.work / "judge.sqlite"
    return judge_of(run.recipe.judge, cache=cache, seed=run.recipe.seed, on_verdict=on_verdict)


def choosing_judge(run: Run) -> Judge:
    """Who judges candidates and tuned points: the rules, which are free, or the recipe's judge."""
    from abliterator.judge import RuleJudge

    if run.recipe.selection.judge != "recipe":
        return RuleJudge()
    # how far it agrees with people changes no verdict, so it is no reason to choose again
    settings = run.recipe.judge.model_copy(update={"calibration": None})
    return judge_of(settings, cache=run.workspace.work / "judge.sqlite", seed=run.recipe.seed)


def judge_of(
    settings: JudgeSettings,
    *,
    cache: Path,
    seed: int = 0,
    on_verdict: Callable[[Tally], None] | None = None,
) -> Judge:
    """The judge that a recipe's section asks for.

    Args:
        settings: the section.
        cache: file for the replies of a judge that is paid.
        seed: of its order.
        on_verdict: hears how far it has come.

    Raises:
        JudgeError: for a calibration that cannot be read, or is of another judge.
    """
    from abliterator.judge import Calibrated, OpenAIJudge, RuleJudge, read_calibration

    judge: Judge = (
        RuleJudge()
        if settings.kind == "rules"
        else OpenAIJudge(settings, cache=cache, seed=seed, on_verdict=on_verdict)
    )
    if settings.calibration is None:
        return judge
    calibration = read_calibration(Path(settings.calibration), judge.identity)
    return Calibrated(judge, calibration.summary())


def require_key(settings: JudgeSettings) -> None:
    """Raises ServerError if the judge needs a key that the environment does not hold."""
    from abliterator.server import key_of

    if settings.kind == "openai":
        key_of(settings)


def note_plain_http(settings: JudgeSettings, progress: Progress) -> None:
    """Notes that a judge's key would cross a network unencrypted."""
    from abliterator.server import warn_of_plain_http

    if settings.kind == "openai" and (
        warning := warn_of_plain_http(
            settings.base_url, settings.api_key_env, name=f"{settings.section}.base_url"
        )
    ):
        progress.note(warning)


def _judge(run: Run) -> tuple[list[Path], Parts]:
    from abliterator.judge import judge_completions

    answers = completions(run)
    note_plain_http(run.recipe.judge, run.progress)
    with run.progress.bar("verdicts", len(answers)) as advance:
        judge = _judge_of(run, on_verdict=_teller(advance))
        verdicts = judge_completions(answers, judge)
    path = _verdicts_path(run)
    write_text_atomic(path, as_lines(verdict.model_dump_json() for verdict in verdicts))
    identity = _compared(judge.identity, verdicts, run)
    _tell(run.progress, identity, verdicts)
    return [path, save_value(_identity_path(run), identity)], {}


def _teller(advance: Callable[..., None]) -> Callable[[Tally], None]:
    def tell(tally: Tally) -> None:
        advance(1, status=str(tally))

    return tell


def _compared(identity: JudgeIdentity, verdicts: Sequence[Verdict], run: Run) -> JudgeIdentity:
    """The judge, and how often the rules, which are free, disagree with it."""
    from abliterator.judge import RuleJudge, disagreement, judge_completions

    disagreements = dict(identity.disagreement)
    if identity.kind != "rules":
        by_rules = judge_completions(completions(run), RuleJudge())
        if (rate := disagreement(by_rules, verdicts)) is not None:
            disagreements["rules"] = rate
    return identity.model_copy(update={"disagreement": disagreements})


def _tell(progress: Progress, identity: JudgeIdentity, verdicts: Sequence[Verdict]) -> None:
    """What a reader of the rates should know first; of the rule judge there is nothing to say."""
    from abliterator.judge import counted, unscored_reasons

    reasons = unscored_reasons(verdicts)
    if reasons:
        n = sum(reasons.values())
        progress.note(f"{n} of {len(verdicts)} answers are unscored: {counted(reasons)}")
    for other, rate in identity.disagreement.items():
        whom = "itself, asked again," if other == "itself" else f"the judge `{other}`"
        progress.note(f"The judge disagrees with {whom} on {rate.value:.1%} of {rate.n} answers.")
    if identity.usage:
        spent = ", ".join(f"{value:g} {name}" for name, value in identity.usage.items())
        progress.note(f"The judge's calls of this folder: {spent}.")


def _verdicts_path(run: Run) -> Path:
    return run.workspace.work / "verdicts.jsonl"


def _identity_path(run: Run) -> Path:
    return run.workspace.work / "judge.json"


def verdicts_of(run: Run) -> list[Verdict]:
    """All verdicts, base and edited."""
    lines = read_lines(run.artefact("judge", _verdicts_path(run)))
    return [Verdict.model_validate_json(line) for line in lines]


def judge_identity(run: Run) -> JudgeIdentity:
    """Which judge gave the verdicts, and what is known of it."""
    return JudgeIdentity.model_validate_json(read_text(run.artefact("judge", _identity_path(run))))


JUDGE = Stage("judge", 4, _judge_inputs, _judge)
