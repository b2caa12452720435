"""All measurements of a loaded model: answers, verdicts on them, divergence.

Selection, tuning, studies, comparison and the stages of a build use it. The divergence is
KL(base || edited) along the base's own greedy answers, so both read the same tokens at every
position; of a model that thinks first, along the answer after its thinking. Perplexity is of fixed
prose that comes with the package.

    context = EvaluationContext(engine, plan, target, neutral, RuleJudge(), max_new_tokens=64, ...)
    with EditEvaluator(context, scratch) as evaluator:
        measured = evaluator.measure("the edit", context.writer_edit(basis))
    measured.judged.summary.refusal, measured.divergence.kl
"""

from abliterator.evaluation._answers import (
    Bar,
    JudgedAnswers,
    answer_and_judge,
    answer_sets,
    as_completions,
    completions_of,
    judge_answers,
    no_bar,
    summarise_draws,
)
from abliterator.evaluation._budgets import answers_within
from abliterator.evaluation._context import EvaluationContext, RenderedPrompts
from abliterator.evaluation._conversations import answer_conversations, kept_answers, spoken
from abliterator.evaluation._evaluator import EditEvaluator, MeasuredEdit, OnStep
from abliterator.evaluation._kl import kl_divergence, kl_terms, require_finite
from abliterator.evaluation._paths import (
    LogitFile,
    PathDivergence,
    answer_path,
    base_paths,
    behind_thinking,
    path_divergence,
    summarise_divergence,
)
from abliterator.evaluation._perplexity import neutral_text, text_perplexity
from abliterator.evaluation._race import Entrant, WholeFront, race
from abliterator.evaluation._suite import answers_of, score_conversations
from abliterator.evaluation._two_checkpoints import measure_divergence

__all__ = [
    "Bar",
    "EditEvaluator",
    "Entrant",
    "EvaluationContext",
    "JudgedAnswers",
    "LogitFile",
    "MeasuredEdit",
    "OnStep",
    "PathDivergence",
    "RenderedPrompts",
    "WholeFront",
    "answer_and_judge",
    "answer_conversations",
    "answer_path",
    "answer_sets",
    "answers_of",
    "answers_within",
    "as_completions",
    "base_paths",
    "behind_thinking",
    "completions_of",
    "judge_answers",
    "kept_answers",
    "kl_divergence",
    "kl_terms",
    "measure_divergence",
    "neutral_text",
    "no_bar",
    "path_divergence",
    "race",
    "require_finite",
    "score_conversations",
    "spoken",
    "summarise_divergence",
    "summarise_draws",
    "text_perplexity",
]
