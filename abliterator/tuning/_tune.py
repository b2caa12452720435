"""From a start to a front of settings."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from abliterator.tuning._descend import Step, descend
from abliterator.tuning._front import Yardstick, with_front
from abliterator.tuning._lessons import make_lessons, with_dodges
from abliterator.tuning._types import Lessons, Point, Setting, Settings, Subject


class Tuned(NamedTuple):
    """Settings and what each one does to held-out prompts, in the same order.

    Attributes:
        settings: edits that can be baked.
        points: what they do; the first is the start itself, at the plan's strengths.
        lessons: target prompts that were learned from.
    """

    settings: list[Setting]
    points: list[Point]
    lessons: int


def tune(
    subject: Subject,
    basis: Tensor,
    settings: Settings,
    *,
    on_step: Step = lambda what: None,
) -> Tuned:
    """Descends from `basis`, and measures what came of it.

    Args:
        subject: the model, which writers are edited, and the prompts.
        basis: Q [H, k] float64 of the start, orthonormal columns.
        settings: of the descent.
        on_step: called with each step that is done.

    Raises:
        DirectionError: if there is too little to learn from, or the descent diverges.
    """
    lessons = make_lessons(subject, basis, tokens=settings.tokens)
    on_step(f"{len(lessons.target)} lessons")

    def relearn(learned: Lessons, setting: Setting) -> Lessons:
        new, dodged = with_dodges(subject, learned, setting, tokens=settings.tokens)
        on_step(f"{dodged} dodges")
        return new

    ends = descend(subject, lessons, basis, settings, on_step=on_step, relearn=relearn)
    yardstick = Yardstick(subject, basis, tokens=settings.tokens)
    plain = Setting(basis, {e.writer.module: e.strength for e in subject.plan.edits})
    tried = [(0.0, 1.0, plain)]
    tried += [
        (weight, scale, end.scaled(scale))
        for weight, end in zip(settings.kl_weights, ends, strict=True)
        for scale in settings.scales
    ]
    points = []
    for weight, scale, setting in tried:
        points.append(yardstick.measure(setting, kl_weight=weight, scale=scale))
        on_step(f"weight {weight:g} x {scale:g} judged")
    return Tuned([setting for *_, setting in tried], with_front(points), len(lessons.target))
