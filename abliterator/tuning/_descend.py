"""The descent itself: Adam on strengths and directions, through the preview of the edit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from abliterator.errors import DirectionError
from abliterator.evaluation import kl_terms
from abliterator.tuning._parameters import EditParameters, mean_of, slow_down
from abliterator.tuning._rows import answer_logprobs, token_logprobs
from abliterator.tuning._types import PreferencePair, PreferencePairs, Row, TunedEdit, TuningContext

LAST = 1 / 3  # of a phase's steps, whose mean is its result: single steps are noisy

T = TypeVar("T")
Step = Callable[[str], None]
AskAgain = Callable[[PreferencePairs, TunedEdit], PreferencePairs]


def descend(
    context: TuningContext,
    pairs: PreferencePairs,
    basis: Tensor,
    *,
    on_step: Step,
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
    chance = random.Random(context.evaluation.seed)
    neutral = _batches(pairs.neutral, config.batch, chance)
    averaged = max(1, round(config.steps * LAST))
    ends: list[TunedEdit] = []
    for weight in config.kl_weights:
        if ends:
            pairs = ask_again(pairs, ends[-1])
        target = _batches(pairs.target, config.batch, chance)
        optimiser = parameters.optimiser()
        late: list[TunedEdit] = []
        for step in range(config.steps):
            slow_down(optimiser, step / config.steps)
            batch = [(Row(x.prompt, x.answer), _unwanted(x, chance)) for x in next(target)]
            wanted, kl = _losses(context, parameters, batch, next(neutral))
            loss = wanted + weight * kl
            if not loss.isfinite():
                raise DirectionError(
                    "Tuning diverged: its loss is not finite. Try `--dtype float32`, or start from "
                    "another layer."
                )
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            if step >= config.steps - averaged:
                late.append(parameters.edit())
            on_step(f"loss {wanted.item():.3g}, KL {kl.item():.3g}")
        ends.append(mean_of(late))
    return ends


def _unwanted(pair: PreferencePair, chance: random.Random) -> Row:
    return Row(pair.prompt, chance.choice((pair.refusal, *pair.rejected)))


def _losses(
    context: TuningContext,
    parameters: EditParameters,
    pairs: Sequence[tuple[Row, Row]],
    neutral: Sequence[Row],
) -> tuple[Tensor, Tensor]:
    """What is wanted of target prompts, and the KL on neutral ones; both scalars, lower is better.

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
        each = [
            token_logprobs(logprobs, row.answer)
            for row, logprobs in zip(rows, answer_logprobs(context.loaded, rows), strict=True)
        ]
        edited = answer_logprobs(context.loaded, neutral)
    answers, unwanted = each[: len(pairs)], each[len(pairs) :]
    margins = torch.stack([u.sum() - a.sum() for u, a in zip(unwanted, answers, strict=True)])
    kl = [kl_terms(b, e).sum(dim=1) for b, e in zip(base, edited, strict=True)]
    wanted = softplus(margins).mean() - torch.cat(answers).mean()
    return wanted, (torch.cat(kl).mean() + torch.stack([row[0] for row in kl]).mean()) / 2


def _batches(items: Sequence[T], size: int, chance: random.Random) -> Iterator[list[T]]:
    """Endless batches: all items in a new order each time round."""
    while True:
        order = chance.sample(range(len(items)), len(items))
        whole = range(0, max(1, len(items) - size + 1), size)
        yield from ([items[i] for i in order[start : start + size]] for start in whole)
