"""Controls of an edit: other directions, at its strengths and at its KL, and null distributions.

A null distribution is a statistic of the edit among the same of many edits that owe nothing to the
behaviour: along directions of shuffled labels, and along random ones. The statistic is the judged
product (compliance x coherence) on few prompts. The log-odds of a refusing opening would need no
answers, but an edit that breaks the model lowers them too, and would count as a success.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from abliterator.bake import EditPlan
from abliterator.engines import WriterEdit
from abliterator.errors import UnsupportedModel
from abliterator.evaluation import EditEvaluator, EvaluationContext, judge_answers
from abliterator.record import NullDistribution, Study
from abliterator.statistics import monte_carlo_p
from abliterator.study._rows import NamedEdit, measured_rows
from abliterator.subspace import is_by_writer, random_basis

TOLERANCE = 0.1
"""How far the KL of a matched control may lie from the edit's, as a share of it."""
MOST_SCALES = 8  # that are tried for one control
FARTHEST_SCALE = 100.0  # factor on the strengths beyond which no match is sought
TOGETHER = 25  # draws that run side by side
_LEAST_KL = 1e-12  # for a logarithm, where an edit changes nothing


def study_controls(
    evaluator: EditEvaluator,
    basis: Tensor,
    shuffled: Sequence[Tensor],
    *,
    draws: int,
    matched: int = 0,
    nulls: Mapping[str, Sequence[Tensor]] | None = None,
    null_prompts: int = 16,
    null_tokens: int = 48,
) -> Study:
    """The edit itself, and the same edit along directions that are independent of the behaviour.

    If random directions have the same effect, the behaviour is unstable, and the effect is not that
    of the direction. At the strengths of the edit, a random direction may move neutral answers much
    less than the edit, or break the model; a matched one moves them as far.

    Args:
        evaluator: the base, measured.
        basis: Q [H, k], or [L, H, k] with one a block, or pairs [M, 2, H, r], which get separate
            draws; of pairs U = V then.
        shuffled: Q of directions from shuffled labels, one a draw; may be none.
        draws: of random directions at the edit's strengths.
        matched: so many of these draws are measured at matched KL too (`matched_edit`).
        nulls: Q of every draw of a null distribution, by what was drawn.
        null_prompts: target prompts of the statistic of null distributions, at most.
        null_tokens: of a judged answer there, at most.
    """
    drawn = [random_like(basis, draw) for draw in range(max(draws, matched))]
    bases = [("the edit", basis)]
    bases += [(f"random directions {i}", other) for i, other in enumerate(drawn[:draws], start=1)]
    bases += [(f"shuffled labels {i}", other) for i, other in enumerate(shuffled, start=1)]
    edits = [NamedEdit(name, evaluator.context.writer_edit(other)) for name, other in bases]
    rows = measured_rows(evaluator, edits)
    divergence = rows[1].divergence
    if matched and divergence and divergence.kl and divergence.kl.value > 0:
        kl = divergence.kl.value
        edits = [
            matched_edit(evaluator, other, kl, name=f"random directions {i}")
            for i, other in enumerate(drawn[:matched], start=1)
        ]
        rows += measured_rows(evaluator, edits)[1:]
    return Study(
        name="controls",
        asks="Is it these directions, or does any edit of this size do the same?",
        rows=rows,
        nulls=tuple(
            null_distribution(
                evaluator, basis, bases, of=of, prompts=null_prompts, tokens=null_tokens
            )
            for of, bases in (nulls or {}).items()
        ),
    )


def random_like(basis: Tensor, draw: int) -> Tensor:
    """Random directions of the same shape; a block's own where each block has its own.

    Pairs that are the same for every module get one draw for all.
    """
    d_model, k = basis.shape[-2:]
    if basis.ndim == 2:
        return random_basis(d_model, k, seed=draw)
    if is_by_writer(basis) and bool((basis == basis[:1]).all()):
        return random_basis(d_model, k, seed=draw).expand_as(basis).contiguous()
    seeds = range(draw * len(basis), (draw + 1) * len(basis))
    bases = torch.stack([random_basis(d_model, k, seed=seed) for seed in seeds])
    return torch.stack([bases, bases], dim=1) if is_by_writer(basis) else bases


def matched_edit(evaluator: EditEvaluator, basis: Tensor, kl: float, *, name: str) -> NamedEdit:
    """The edit along Q at all strengths times the factor that gives it a KL on neutral answers.

    The strengths are scaled, since draws at given strengths hardly differ in KL where the stream is
    wide: none of them would be near the edit's. KL grows about with the square of the factor, from
    which the next one is extrapolated until it is within `TOLERANCE`. A factor above 1 / strength
    turns what was written along Q around.

    Args:
        evaluator: the base, measured.
        basis: Q [H, k], or [L, H, k].
        kl: nats a token, positive.
        name: of the row.

    Returns:
        The edit with the nearest KL; its name says whether that is within the tolerance.
    """
    tried: list[tuple[float, float]] = []  # factor, log(KL / kl)
    scale, slope = 1.0, 2.0
    while len(tried) < MOST_SCALES and scale not in (earlier for earlier, _ in tried):
        edit = scaled_edit(evaluator.context.plan, basis, scale)
        measured = evaluator.kl(f"{name}, strength x {scale:.3g}", edit)
        distance = math.log(max(measured, _LEAST_KL) / kl)
        tried.append((scale, distance))
        if _is_within(distance):
            break
        if len(tried) > 1:
            (before, distance_before), _ = tried[-2:]
            rise = (distance - distance_before) / math.log(scale / before)
            slope = min(max(rise, 1.0), 4.0)
        scale = min(scale * math.exp(-distance / slope), FARTHEST_SCALE)
    scale, distance = min(tried, key=lambda attempt: abs(attempt[1]))
    note = f"{'matched' if _is_within(distance) else 'nearest'} KL, strength x {scale:.3g}"
    return NamedEdit(
        f"{name}, {note}", scaled_edit(evaluator.context.plan, basis, scale), scale=scale
    )


def _is_within(distance: float) -> bool:
    """Whether log(KL / kl) is within the tolerance."""
    return abs(math.expm1(distance)) <= TOLERANCE


def scaled_edit(plan: EditPlan, basis: Tensor, scale: float) -> WriterEdit:
    """The edit that removes Q at a plan's strengths times a factor."""
    strengths = {edit.writer.module: scale * edit.strength for edit in plan.edits}
    return WriterEdit(plan.with_strengths(strengths), basis)


def null_distribution(
    evaluator: EditEvaluator,
    basis: Tensor,
    bases: Sequence[Tensor],
    *,
    of: str,
    prompts: int,
    tokens: int,
) -> NullDistribution:
    """The edit's mean product among those of other directions, at the same strengths.

    Args:
        evaluator: the base, measured.
        basis: Q of the edit.
        bases: Q of every draw.
        of: what was drawn.
        prompts: of the target prompts, drawn by the seed, at most.
        tokens: of a judged answer, at most.
    """
    context = evaluator.context
    total = len(context.target.prompts)
    chosen = random.Random(context.seed).sample(range(total), min(prompts, total))
    few = replace(
        context,
        target=context.target.at(sorted(chosen)),
        max_new_tokens=min(tokens, context.max_new_tokens),
    )
    products: list[float] = []
    for start in range(0, len(bases) + 1, TOGETHER):
        products += mean_products(few, [basis, *bases][start : start + TOGETHER])
        evaluator.on_step(f"{len(products) - 1} draws of {of}")
    observed, *values = products
    return NullDistribution(
        of=of,
        statistic="product",
        prompts=len(chosen),
        tokens=few.max_new_tokens,
        observed=observed,
        values=tuple(values),
        p_value=monte_carlo_p(observed, values),
    )


def mean_products(context: EvaluationContext, bases: Sequence[Tensor]) -> list[float]:
    """The mean judged product on target prompts under edits that remove each Q.

    Side by side, or one at a time where the rows of a batch cannot have edits of their own.
    """
    edits = [context.writer_edit(basis) for basis in bases]
    engine, prompts = context.engine, context.target.token_ids
    tokens, batch_size = context.max_new_tokens, context.batch_size
    try:
        with engine.edited_side_by_side(edits, max_batch_tokens=context.max_batch_tokens) as edited:
            answers = edited.answers(prompts, max_new_tokens=tokens, batch_size=batch_size)
    except UnsupportedModel:
        answers = []
        for edit in edits:
            with engine.edited(edit):
                answers.append(
                    engine.answers(prompts, max_new_tokens=tokens, batch_size=batch_size)
                )
    return [judge_answers(context, context.target, each).mean_product for each in answers]
