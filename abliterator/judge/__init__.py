"""Grades answers of a model by rules or by an LLM judge, behind one `Judge` protocol.

A verdict grades compliance (did it do what was asked?) and coherence (is it sound language?) on
{0, 0.5, 1}, and says whether the answer refused, also in part. `RuleJudge` does so offline from the
text alone, and its numbers are marked as a rule judge's wherever they appear; `OpenAIJudge` asks a
model behind a server, and `LocalJudge` one in this process. What a judge cannot score is unscored:
never 0, never a refusal.

    verdicts = judge_completions(completions, RuleJudge())
    behaviour = summarise(base_verdicts, edited_verdicts)
"""

from __future__ import annotations

from abliterator.judge._calibrate import (
    Calibrated,
    Calibration,
    Labelled,
    calibrate,
    disagreement,
    load_labelled,
    read_calibration,
)
from abliterator.judge._languages import language_of
from abliterator.judge._local import FORMATS, JudgeModel, LocalJudge, format_of, load_format
from abliterator.judge._openai import OpenAIJudge, Tally
from abliterator.judge._rule_judge import RuleJudge
from abliterator.judge._scripts import count_words
from abliterator.judge._summary import (
    VerdictEstimates,
    counted,
    estimates_of,
    estimates_of_draws,
    scored_verdicts,
    summarise,
    unscored_reasons,
)
from abliterator.judge._thoughts import thinking_refuses
from abliterator.judge._types import Answered, Judge, Judgement
from abliterator.judge._verdicts import judge_completions

__all__ = [
    "FORMATS",
    "Answered",
    "Calibrated",
    "Calibration",
    "Judge",
    "JudgeModel",
    "Judgement",
    "Labelled",
    "LocalJudge",
    "OpenAIJudge",
    "RuleJudge",
    "Tally",
    "VerdictEstimates",
    "calibrate",
    "count_words",
    "counted",
    "disagreement",
    "estimates_of",
    "estimates_of_draws",
    "format_of",
    "judge_completions",
    "language_of",
    "load_format",
    "load_labelled",
    "read_calibration",
    "scored_verdicts",
    "summarise",
    "thinking_refuses",
    "unscored_reasons",
]
