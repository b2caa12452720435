"""The stage that judges the answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterator.checkpoint import write_text_atomic
from abliterator.pipeline._rollouts import completions
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Parts, Stage
from abliterator.record import Verdict

if TYPE_CHECKING:
    pass


def _judge_inputs(run: Run) -> Any:
    from abliterator.judge import RuleJudge

    return [
        run.digest("rollouts"),
        run.recipe.judge.model_dump(mode="json"),
        RuleJudge().identity.model_dump(mode="json"),
    ]


def _judge(run: Run) -> tuple[list[Path], Parts]:
    from abliterator.judge import RuleJudge, judge_completions

    verdicts = judge_completions(completions(run), RuleJudge())
    path = run.workspace.work / "verdicts.jsonl"
    write_text_atomic(path, "".join(verdict.model_dump_json() + "\n" for verdict in verdicts))
    return [path], {}


def verdicts_of(run: Run) -> list[Verdict]:
    """All verdicts, base and edited."""
    text = (run.workspace.work / "verdicts.jsonl").read_text()
    return [Verdict.model_validate_json(line) for line in text.splitlines()]


JUDGE = Stage("judge", 1, _judge_inputs, _judge)
