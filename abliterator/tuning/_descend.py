"""Gradient descent: Adam on strengths and directions, through the preview of the edit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from abliterator.errors import DirectionError
from abliterator.evaluation import OnStep, kl_terms
from abliterator.tuning._parameters import EditParameters, mean_of, slow_down
from abliterator.tuning._rows import answer_logprobs, token_logprobs
from abliterator.tuning._types import PreferencePair, PreferencePairs, Row, TunedEdit, TuningContext

LAST = 1 / 3  # of a phase's steps, whose mean is its result: single steps are noisy

T = TypeVar("T")
AskAgain = Callable[[PreferencePairs, TunedEdit], PreferencePairs]


def descend(
    context: TuningContext,
    pairs: PreferencePairs,
    basis: Tensor,
    *,
    on_step: OnStep,
    ask_again: AskAgain = lambda pairs, edit: pairs,
) -> list[TunedEdit]:
    """One edit at the end of each phase, in the order of the config's `kl_weights`.

    Minimises, over batches of preference pairs and of neutral rows,

        mean softplus(log p(rejected) - log p(answer)) - mean log p(answer) / tokens + w KL

    where what is rejected is the base's refusal or a response that the judge rejected after an
    earlier phase, one of them by chance in each step, and KL(base || edited) is in nats along
    neutral answers: the mean of the first token's and of all tokens', because an edit shows most
    where an answer begins.

    Args:
        context: the model, which writers are edited, and the config of the descent.
        pairs: from `make_pairs`.
        basis: Q [H, k] of the start, or [L, H, k] with one a block.
        on_step: called with each step that is done.
        ask_again: given the pairs and the edit that a phase ended with, the next phase's pairs.

    Raises:
        DirectionError: if the loss is not finite.
    """
    config = context.config
    parameters = EditParameters(context, basis)
    rng = random.Random(context.evaluation.seed)
    neutral = _batches(pairs.neutral, config.batch, rng)
    n_averaged = max(1, round(config.steps * LAST))
    results: list[TunedEdit] = []
    for weight in config.kl_weights:
        if results:
            pairs = ask_again(pairs, results[-1])
        target = _batches(pairs.target, config.batch, rng)
        optimiser = parameters.optimiser()
        last_edits: list[TunedEdit] = []
        for step in range(config.steps):
            slow_down(optimiser, step / config.steps)
            batch = [(Row(x.prompt, x.answer), _unwanted(x, rng)) for x in next(target)]
            preference_loss, kl = _losses(context, parameters, batch, next(neutral))
            loss = preference_loss + weight * kl
            if not loss.isfinite():
                raise DirectionError(
                    "Tuning diverged: its loss is not finite. Try `--dtype float32`, or start from "
                    "another layer."
                )
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            if step >= config.steps - n_averaged:
                last_edits.append(parameters.edit())
            on_step(f"loss {preference_loss.item():.3g}, KL {kl.item():.3g}")
        results.append(mean_of(last_edits))
    return results


def _unwanted(pair: PreferencePair, rng: random.Random) -> Row:
    return Row(pair.prompt, rng.choice((pair.refusal, *pair.rejected)))


def _losses(
    context: TuningContext,
    parameters: EditParameters,
    pairs: Sequence[tuple[Row, Row]],
    neutral: Sequence[Row],
) -> tuple[Tensor, Tensor]:
    """The preference loss on target prompts, and the KL on neutral ones; both scalars.

    Backpropagated together: the two batches run one after the other, so that rows of one kind, of
    similar length, share their padding.

    Args:
        context: the model.
        parameters: of the edit.
        pairs: an answer to a target prompt, and what must become less likely than it.
        neutral: answers that must stay.
    """
    with torch.no_grad():
        base = answer_logprobs(context.loaded, neutral)
    rows = [answer for answer, _ in pairs] + [unwanted for _, unwanted in pairs]
    with parameters.applied():
        of_rows = [
            token_logprobs(logprobs, row.answer)
            for row, logprobs in zip(rows, answer_logprobs(context.loaded, rows), strict=True)
        ]
        edited = answer_logprobs(context.loaded, neutral)
    answers, unwanted = of_rows[: len(pairs)], of_rows[len(pairs) :]
    margins = torch.stack([u.sum() - a.sum() for u, a in zip(unwanted, answers, strict=True)])
    kl = [kl_terms(b, e).sum(dim=1) for b, e in zip(base, edited, strict=True)]
    preference_loss = softplus(margins).mean() - torch.cat(answers).mean()
    return preference_loss, (torch.cat(kl).mean() + torch.stack([row[0] for row in kl]).mean()) / 2


def _batches(items: Sequence[T], size: int, rng: random.Random) -> Iterator[list[T]]:
    """Endless batches: all items in a new order each time round."""
    while True:
        order = rng.sample(range(len(items)), len(items))
        starts = range(0, max(1, len(items) - size + 1), size)
        yield from ([items[i] for i in order[start : start + size]] for start in starts)
