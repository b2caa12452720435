"""What tuning is given, and what it finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from abliterator.bake import EditPlan
from abliterator.record import Estimate, Frozen

if TYPE_CHECKING:
    from torch import Tensor

    from abliterator.judge import Judge
    from abliterator.model import LoadedModel

Tokens = tuple[int, ...]


class Asked(NamedTuple):
    """Prompts and their rendered token ids, in one order."""

    prompts: Sequence[str]
    token_ids: Sequence[Sequence[int]]


class Row(NamedTuple):
    """A rendered prompt and an answer that follows it."""

    prompt: Tokens
    answer: Tokens


@dataclass(frozen=True)
class Subject:
    """The loaded base, which writers may be edited, and the prompts that tuning sees.

    Attributes:
        loaded: the base model; it is never reloaded, and its weights never change.
        plan: which writers are edited; its strengths are where the plain edit would put them.
        target: prompts on which the behaviour shows; lessons are made of them.
        neutral: prompts whose answers must stay: neutral ones, and the contrast.
        held_out: target prompts on which points are judged; no lesson is made of them.
        held_out_neutral: prompts on which the divergence of points is measured.
        judge: who says what an answer is worth.
        max_new_tokens: of a judged answer.
        batch_size: prompts answered together.
    """

    loaded: LoadedModel
    plan: EditPlan
    target: Asked
    neutral: Asked
    held_out: Asked
    held_out_neutral: Asked
    judge: Judge
    max_new_tokens: int
    batch_size: int


class Lesson(NamedTuple):
    """A target prompt, an answer to it that a judge accepted, and what must become less likely.

    Attributes:
        place: of the prompt among the target prompts.
        prompt: rendered.
        answer: what a judge accepted, from its beginning.
        refusal: the base's own, from its beginning.
        dodges: what edits under way said instead of an answer, the latest first.
    """

    place: int
    prompt: Tokens
    answer: Tokens
    refusal: Tokens
    dodges: tuple[Tokens, ...] = ()


@dataclass(frozen=True)
class Lessons:
    """What is learned from: refusals against answers, and answers that must stay.

    Attributes:
        target: at least `LEAST_LESSONS`.
        neutral: the base's own greedy answers.
        asked: target prompts tried, of which `target` are those that gave a lesson.
    """

    target: tuple[Lesson, ...]
    neutral: tuple[Row, ...]
    asked: int


@dataclass(frozen=True)
class Settings:
    """How the descent is run.

    Attributes:
        strengths: whether each writer's strength is tuned; else all stay at the plan's.
        directions: whether the directions are tuned; else they stay where they started.
        steps: of Adam, for each weight of the KL.
        batch: lessons, and as many neutral rows, in one step.
        tokens: of an answer, from its beginning, that are learned from.
        kl_weights: what a nat on neutral prompts costs against a target prompt's loss; the descent
            goes on from one to the next and leaves a point at the end of each.
        scales: factors on the strengths of each such point: weaker edits, for nothing.
        seed: of the batches.
    """

    strengths: bool = True
    directions: bool = True
    steps: int = 20
    batch: int = 8
    tokens: int = 12
    kl_weights: tuple[float, ...] = (5.0, 20.0, 80.0)
    scales: tuple[float, ...] = (1.0, 0.75, 0.5)
    seed: int = 0


class Setting(NamedTuple):
    """An edit: Q and one strength a writer.

    Attributes:
        basis: Q [H, k] float64, orthonormal columns; or [L, H, k] with one a block.
        strengths: by module path of the writer.
    """

    basis: Tensor
    strengths: Mapping[str, float]

    def scaled(self, factor: float) -> Setting:
        """The same edit, weaker or stronger; strengths have four digits, as people read them."""
        return Setting(self.basis, {m: round(factor * s, 4) for m, s in self.strengths.items()})


class Point(Frozen):
    """What one setting does to held-out prompts.

    `kl_weight` and `scale` say how it was made: the weight of the KL at the end of whose leg it
    was left, and the factor on its strengths; `kl` is nats per token along the base's answers,
    `cosine` how far the directions moved (the least singular value of Q_startᵀ Q).
    """

    kl_weight: float
    scale: float
    cosine: float
    kl: float
    kl_first_token: float
    refusal: Estimate | None
    compliance: Estimate | None
    coherence: Estimate | None
    product: Estimate | None
    on_front: bool = False
