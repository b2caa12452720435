"""Scores of many edits at once, from distributions and from judged answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from abliterator.directions import Node
from abliterator.engines import AnswerPath, SideBySide, Steering, Tokens
from abliterator.errors import PromptError
from abliterator.evaluation import (
    EvaluationContext,
    JudgedAnswers,
    RenderedPrompts,
    answer_and_judge,
    base_paths,
    behind_thinking,
    judge_answers,
    path_divergence,
)
from abliterator.record import Candidate, SelectionBase
from abliterator.selection._openings import learn_openings, log_odds
from abliterator.selection._pool import Pool

LEAST_REFUSAL = 0.1  # of the base: below it there is nothing to remove
# answer tokens along which distributions are compared; the first is the prompt's own
KL_TOKENS = 4


class ScoringPrompts(NamedTuple):
    """Prompts by which candidates are scored before any answer is judged.

    Attributes:
        target: prompts that show the behaviour; directions may have been taken from them.
        contrast: prompts like target on which the behaviour does not show.
    """

    target: RenderedPrompts
    contrast: RenderedPrompts


@dataclass(frozen=True)
class Baseline:
    """Measurements of the base, made once.

    Attributes:
        openings: beginnings of its refusals.
        judged: its answers to the held-out target prompts.
        scoring: the prompts of the scores; of a base that thinks, each with its thinking.
        target_score: mean log-odds of a refusing opening on target prompts.
        contrast_score: the same on contrast prompts.
        paths: its answers to neutral prompts.
        logits: its logits along them, [positions, V] each.
        tokens: generated in total.
    """

    openings: tuple[Tokens, ...]
    judged: JudgedAnswers
    scoring: ScoringPrompts
    target_score: float
    contrast_score: float
    paths: list[AnswerPath]
    logits: list[Tensor]
    tokens: int

    @property
    def recorded(self) -> SelectionBase:
        """The part of it that is recorded."""
        return SelectionBase(bypass=self.target_score, answers=self.judged.summary)


def measure_base(context: EvaluationContext, scoring: ScoringPrompts) -> Baseline:
    """Answers and distributions of the base.

    Raises:
        PromptError: if it does not refuse its target prompts, or refuses in words with which it
            answers other prompts too.
        GenerationError: if it thinks for longer than an answer may be.
    """
    judged = answer_and_judge(context, context.target)
    refusals = _answer_ids(judged, refused=True)
    if len(refusals) < LEAST_REFUSAL * len(judged.answers):
        raise PromptError(
            f"The base refuses {len(refusals)} of {len(judged.answers)} held-out target prompts "
            f"(judged by {context.judge.identity.kind}, {context.max_new_tokens} tokens), so there "
            f"is nothing to remove. Give target prompts that it refuses, or name the layers in the "
            f"recipe.{_thinking_note(judged)}"
        )
    contrast = answer_and_judge(context, scoring.contrast)
    if any(answer.start_token for answer in (*judged.answers, *contrast.answers)):
        scoring = ScoringPrompts(*(behind_thinking(context, prompts) for prompts in scoring))
        contrast = answer_and_judge(context, scoring.contrast)
    openings = learn_openings(refusals, _answer_ids(contrast, refused=False))
    if not openings:
        raise PromptError(
            f"The base begins its {len(refusals)} refusals as it begins its answers to contrast "
            f"prompts, so candidates cannot be scored by how answers begin. Give contrast prompts "
            f"that it answers, or name the layers in the recipe.{_thinking_note(judged)}"
        )
    paths = base_paths(
        context.engine,
        context.neutral.token_ids,
        tokens=context.kl_tokens,
        max_new_tokens=context.max_new_tokens,
        batch_size=context.batch_size,
    )
    limit = context.max_batch_tokens
    logits = dict(context.engine.logits(paths, max_batch_tokens=limit, share_prefix=True))

    def score_of(prompts: RenderedPrompts) -> float:
        likelihoods = context.engine.log_likelihoods(
            prompts.token_ids, openings, max_batch_tokens=limit
        )
        return float(log_odds(likelihoods).mean())

    return Baseline(
        openings=openings,
        judged=judged,
        scoring=scoring,
        target_score=score_of(scoring.target),
        contrast_score=score_of(scoring.contrast),
        paths=paths,
        logits=[logits[index] for index in range(len(paths))],
        tokens=judged.tokens + contrast.tokens + sum(path.positions - 1 for path in paths),
    )


def _answer_ids(judged: JudgedAnswers, *, refused: bool) -> list[Tokens]:
    """Token ids of the answers that refuse, or of those that do not, without thinking."""
    pairs = zip(judged.answers, judged.verdicts, strict=True)
    return [a.token_ids[a.start_token :] for a, v in pairs if bool(v.refused) == refused]


def _thinking_note(judged: JudgedAnswers) -> str:
    """Advice for a model that thinks first; "" for others."""
    thinking = sum(answer.start > 0 for answer in judged.answers)
    if not thinking:
        return ""
    return (
        f" {thinking} of its {len(judged.answers)} replies begin with thinking, and may be cut "
        "within it: switch thinking off in `chat.template_kwargs` (often `enable_thinking: "
        "false`), or raise `selection.tokens`."
    )


def score(context: EvaluationContext, base: Baseline, pool: Pool) -> list[Candidate]:
    """The scores of every place of `pool`, in their order, from distributions alone.

    Raises:
        DirectionError: for a direction of no length.
    """
    limit, (target, contrast) = context.max_batch_tokens, base.scoring
    edits = [context.writer_edit(pool.stack([place], 1).basis) for place in pool.places]
    with context.engine.edited_side_by_side(edits, max_batch_tokens=limit) as edited:
        bypass = mean_log_odds(edited, target, base.openings)
        kl = mean_kl(edited, base, prompts=len(target.prompts))
    added = [Steering(place.layer, pool.direction(place)) for place in pool.places]
    with context.engine.edited_side_by_side(added, max_batch_tokens=limit) as steered:
        induced = mean_log_odds(steered, contrast, base.openings)
    return [
        Candidate(
            layer=place.layer,
            position=place.position,
            node=place.node if isinstance(place, Node) else None,
            bypass=bypass[i],
            kl=kl[i],
            induce=induced[i] - base.contrast_score,
        )
        for i, place in enumerate(pool.places)
    ]


def mean_log_odds(
    edited: SideBySide, prompts: RenderedPrompts, openings: Sequence[Tokens]
) -> list[float]:
    """The mean log-odds of a refusing opening over prompts, for each edit."""
    likelihoods = edited.log_likelihoods(prompts.token_ids, openings)
    return [float(mean) for mean in log_odds(likelihoods).mean(dim=1)]


def mean_kl(edited: SideBySide, base: Baseline, *, prompts: int | None = None) -> list[float]:
    """KL(base || edited) in nats: mean over neutral prompts of the mean over answer tokens.

    Over the first `prompts` of them; over all unless given.
    """
    paths = base.paths[:prompts]
    kl = torch.zeros(edited.n, len(paths), dtype=torch.float64)
    for edit, path, logits in edited.logits(paths):
        kl[edit, path] = path_divergence(base.logits[path], logits).kl.mean()
    return [float(mean) for mean in kl.mean(dim=1)]


def judge_edits(
    context: EvaluationContext, bases: Sequence[Tensor], prompts: Sequence[int] | None = None
) -> list[JudgedAnswers]:
    """Judged answers to held-out target prompts under edits that remove each of `bases` [H, k].

    Args:
        context: the model and the prompts.
        bases: Q of each edit.
        prompts: indices of the held-out prompts; all unless given.
    """
    target = context.target if prompts is None else context.target.at(prompts)
    edits = [context.writer_edit(basis) for basis in bases]
    limit = context.max_batch_tokens
    with context.engine.edited_side_by_side(edits, max_batch_tokens=limit) as edited:
        answers = edited.answers(
            target.token_ids,
            max_new_tokens=context.max_new_tokens,
            batch_size=context.batch_size,
        )
    return [judge_answers(context, target, of_edit) for of_edit in answers]
