"""The judges of a recipe, made from its sections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from abliterator.pipeline._local_judge import JudgeHost, local_judge
from abliterator.pipeline._progress import Progress
from abliterator.pipeline._run import Run
from abliterator.recipe import JudgeSettings

if TYPE_CHECKING:
    from abliterator.judge import Judge, Tally


def evaluation_judge(run: Run, on_verdict: Callable[[Tally], None] | None = None) -> Judge:
    """The judge of the answers of base and edited."""

    def make_room() -> None:
        run.end_engine()
        run.free()

    return judge_of(
        run.recipe.judge,
        cache=run.workspace.work / "judge.sqlite",
        seed=run.recipe.seed,
        on_verdict=on_verdict,
        host=replace(_host(run), make_room=make_room),
    )


def choosing_judge(run: Run) -> Judge:
    """The judge of candidates and tuned trials: the rules, or the recipe's judge."""
    from abliterator.judge import RuleJudge

    if run.recipe.selection.judge != "recipe":
        return RuleJudge()
    # calibration changes no verdict, so it must not change the key of a selection
    settings = run.recipe.judge.model_copy(update={"calibration": None})
    return judge_of(
        settings,
        cache=run.workspace.work / "judge.sqlite",
        seed=run.recipe.seed,
        # candidates are answered and judged in turn, so both models stay in memory
        host=replace(_host(run), keeps=True),
    )


def _host(run: Run) -> JudgeHost:
    return JudgeHost(
        options=run.options,
        base=run.plan.source,
        trust_remote_code=run.recipe.trust_remote_code,
        note=run.progress.note,
    )


def judge_of(
    settings: JudgeSettings,
    *,
    cache: Path,
    seed: int = 0,
    on_verdict: Callable[[Tally], None] | None = None,
    host: JudgeHost | None = None,
) -> Judge:
    """The judge of a recipe's section.

    Args:
        settings: the section.
        cache: file that caches the replies of a model judge.
        seed: of the order in which a model behind a server judges.
        on_verdict: called with the tally after each verdict.
        host: device and base of a local judge.

    Raises:
        JudgeError: for a calibration that cannot be read, or is of another judge; and for a local
            model that cannot be a judge.
        CheckpointError: for a local judge that is not there.
    """
    from abliterator.judge import Calibrated, OpenAIJudge, RuleJudge, read_calibration

    judge: Judge
    if settings.kind == "rules":
        judge = RuleJudge()
    elif settings.kind == "openai":
        judge = OpenAIJudge(settings, cache=cache, seed=seed, on_verdict=on_verdict)
    else:
        judge = local_judge(settings, host or JudgeHost(), cache=cache, on_verdict=on_verdict)
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
