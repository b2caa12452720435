"""How strengths and directions are tuned, for `edit.strength: auto` and `estimator: tuned`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)

from abliterator.recipe._section import Positive, Section, as_tuple

Numbers = Annotated[
    tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], BeforeValidator(as_tuple)
]


RIDGE, MAX_CHANGE = 0.3, 0.5


class Tuning(Section):
    """Tuning by gradient descent, and which of the tuned edits is used."""

    later_keys: ClassVar = ("ridge", "max_change", "induce")

    steps: Positive = 16
    """Steps of the descent for each weight of the KL."""
    prompts: Positive = 64
    """Target prompts that preference pairs are made of, and as many prompts of each kind whose
    answers must stay."""
    batch: Positive = 8
    """Target prompts, and as many neutral ones, in one step."""
    tokens: Positive = 12
    """Tokens of an answer, from its first, that the loss covers."""
    kl_weights: Numbers = (20.0, 80.0)
    """Weights of the KL divergence (nats, neutral prompts) in the loss, one phase each. Between
    phases, answers that the judge does not accept are added as rejected responses."""
    scales: Numbers = (1.0, 0.6)
    """Each phase's result is also measured at these fractions of its strengths."""
    prefer: Literal["product", "refusals_at_most", "kl_at_most"] = "product"
    """Which tuned edit is used: the best compliance x coherence, or the best within `at_most`."""
    at_most: Annotated[float, Field(gt=0)] | None = None
    """Largest share of refusals, or nats per token on neutral prompts, that `prefer` allows."""

    ridge: Annotated[float, Field(ge=0, allow_inf_nan=False)] = RIDGE
    """For `stack: per_writer`: weight of the distance from the start in the loss, which is
    |U Vᵀ - U₀ V₀ᵀ|² / |U₀ V₀ᵀ|², the mean over the modules."""
    max_change: Annotated[float, Field(gt=0, allow_inf_nan=False)] = MAX_CHANGE
    """For `stack: per_writer`: the build stops before it writes a tensor whose change
    |W' - W| / |W| is larger."""
    induce: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """For `estimator: tuned` and one direction (`k: 1`): weight in the loss of the mean -log p of a
    token of the base's refusals after neutral and contrast prompts, with the direction, at the
    length of the mean difference, added at the first layer. 0 leaves it out; 1, with
    `edit.strength: 1`, is refusal direction optimisation."""

    @field_validator("kl_weights", "scales")
    @classmethod
    def _some(cls, value: Any) -> Any:
        if not value:
            raise ValueError("must hold a number")
        return value

    @model_validator(mode="after")
    def _limit_of_a_preference(self) -> Self:
        if (self.at_most is None) != (self.prefer == "product"):
            raise ValueError("`at_most` belongs to `prefer: refusals_at_most` and `kl_at_most`")
        return self

    @property
    def sets_pairs(self) -> bool:
        """Whether a key is set that only pairs (U, V) have."""
        return (self.ridge, self.max_change) != (RIDGE, MAX_CHANGE)
