"""The descent itself: Adam on strengths and directions, through the preview of the edit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from abliterator.divergence import kl_terms
from abliterator.errors import DirectionError
from abliterator.tuning._knobs import Knobs, mean_of, slow_down
from abliterator.tuning._rows import answer_logprobs, token_logprobs
from abliterator.tuning._types import Lesson, Lessons, Row, Setting, Settings, Subject

LAST = 1 / 3  # of a leg's steps, whose mean is its result: single steps are noisy

T = TypeVar("T")
Step = Callable[[str], None]
Relearn = Callable[[Lessons, Setting], Lessons]


def descend(
    subject: Subject,
    lessons: Lessons,
    basis: Tensor,
    settings: Settings,
    *,
    on_step: Step,
    relearn: Relearn = lambda lessons, setting: lessons,
) -> list[Setting]:
    """One setting at the end of each leg, in the order of `settings.kl_weights`.

    Minimises, over batches of lessons and of neutral rows,

        mean softplus(log p(unwanted) - log p(answer)) - mean log p(answer) / tokens + w KL

    where what is unwanted is the base's refusal or a dodge of an earlier leg, one of them by chance
    in each step, and KL(base || edited) is in nats along neutral answers: the mean of the first
    token's and of all tokens', because an edit shows most where an answer begins.

    Args:
        subject: the model, and which writers are edited.
        lessons: from `make_lessons`.
        basis: Q [H, k] of the start, or [L, H, k] with one a block.
        settings: of the descent.
        on_step: called with each step that is done.
        relearn: given the lessons and the setting that a leg ended with, the next leg's lessons.

    Raises:
        DirectionError: if the loss is not finite.
    """
    knobs = Knobs(subject, basis, settings)
    chance = random.Random(settings.seed)
    neutral = _batches(lessons.neutral, settings.batch, chance)
    averaged = max(1, round(settings.steps * LAST))
    found: list[Setting] = []
    for weight in settings.kl_weights:
        if found:
            lessons = relearn(lessons, found[-1])
        target = _batches(lessons.target, settings.batch, chance)
        optimiser = knobs.optimiser()
        late: list[Setting] = []
        for step in range(settings.steps):
            slow_down(optimiser, step / settings.steps)
            pairs = [(Row(x.prompt, x.answer), _unwanted(x, chance)) for x in next(target)]
            wanted, kl = _losses(subject, knobs, pairs, next(neutral))
            loss = wanted + weight * kl
            if not loss.isfinite():
                raise DirectionError(
                    "Tuning diverged: its loss is not finite. Try `--dtype float32`, or start from "
                    "another layer."
                )
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            if step >= settings.steps - averaged:
                late.append(knobs.setting())
            on_step(f"loss {wanted.item():.3g}, KL {kl.item():.3g}")
        found.append(mean_of(late))
    return found


def _unwanted(lesson: Lesson, chance: random.Random) -> Row:
    return Row(lesson.prompt, chance.choice((lesson.refusal, *lesson.dodges)))


def _losses(
    subject: Subject, knobs: Knobs, pairs: Sequence[tuple[Row, Row]], neutral: Sequence[Row]
) -> tuple[Tensor, Tensor]:
    """What is wanted of target prompts, and the KL on neutral ones; both scalars, lower is better.

    Backpropagated together: the two batches run one after the other, so that rows of one kind, of
    similar length, share their padding.

    Args:
        subject: the model.
        knobs: of the edit.
        pairs: an answer to a target prompt, and what must become less likely than it.
        neutral: answers that must stay.
    """
    with torch.no_grad():
        base = answer_logprobs(subject.loaded, neutral)
    rows = [answer for answer, _ in pairs] + [unwanted for _, unwanted in pairs]
    with knobs.turned():
        each = [
            token_logprobs(logprobs, row.answer)
            for row, logprobs in zip(rows, answer_logprobs(subject.loaded, rows), strict=True)
        ]
        edited = answer_logprobs(subject.loaded, neutral)
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
