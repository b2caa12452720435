"""Settings of how directions are made from activations."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from abliterator.recipe._section import Positive, Section, as_tuple

# Stacks that remove no subspace, but give every module that writes an edit W' = W - s U Vᵀ W.
BY_WRITER = ("sequential", "per_writer")

NamedPosition = Literal["instruction", "after_thinking"]
Position = Annotated[int, Field(le=-1)] | NamedPosition


class DirectionSettings(Section):
    """How directions are made from mean activations."""

    later_keys: ClassVar = ("ridge", "grid")

    estimator: Literal["mean_difference", "whitened", "logistic", "tuned"] = "mean_difference"
    """`mean_difference` is r = mean(target) - mean(contrast); `tuned` continues from it by
    gradients (`tuning`).

    `whitened` is the mean difference under the inverse of the shrunk covariance within the two
    sets, `logistic` the normal of a logistic probe that tells them apart. docs/methods.md has the
    formulas.
    """
    position: (
        Position
        | Literal["sweep"]
        | Annotated[tuple[Position, ...], Field(min_length=2), BeforeValidator(as_tuple)]
    ) = -1
    """Token at which activations are taken: a number counts those that the chat template puts after
    the prompt from their end, -1 being the last one.

    `instruction` is the last token of the user's own text, before anything of the template.
    `after_thinking` is the last one before the answer, behind the base's own thinking about the
    prompt (up to `rollouts.thinking_tokens`); prompts about which it thinks longer are left out.
    `sweep` tries every token that the template puts after the prompt, `[-1, instruction]` those of
    the list, in every layer, and chooses by measurement (`selection`).
    """
    projection: Literal["none", "neutral"] = "none"
    """`neutral` removes the component along the neutral mean from every direction."""
    ridge: Annotated[float, Field(ge=0)] = 0.01
    """How strongly the regression on the sets of `prompts.protect` is damped: of a component along
    one set alone ridge / (1 + ridge) is left; 0 leaves nothing."""
    stack: Literal["layers", "per_layer", "within_layer", "som", "sequential", "per_writer"] = (
        "layers"
    )
    """Which k directions are removed: one of each of k layers, each block's own, or k of one layer.
    `per_writer` removes none: each matrix has an edit of its own.

    `layers` stacks the directions of the first k of `layers`: their span is removed. `sequential`
    removes the same directions one after the other, the first of `layers` first, which leaves a
    part of all but the last where they are not orthogonal (docs/methods.md). `per_layer` removes
    from the output of block i the direction of layer i + 1, or of the nearest of `layers`; k is 1.
    `within_layer` stacks the first layer's mean difference and the principal components of the
    paired differences orthogonal to it, so `contrast` must be a set whose n-th prompt is the n-th
    of `target` without the behaviour. `som` takes the first layer's directions from a
    self-organising map of the target prompts (`grid`): with a number k, those nodes that cover them
    best; with `k: auto` and named `layers`, the nodes are candidates that are judged as a sweep's
    layers are. `per_writer`, with `estimator: tuned`, begins with the stack of `layers` and then
    tunes W' = W - U Vᵀ W of rank k for every module that writes, near that start (`tuning.ridge`);
    no subspace is promised to be absent then.
    """
    grid: Annotated[tuple[Positive, Positive], BeforeValidator(as_tuple)] = (4, 4)
    """Rows and columns of the map of `stack: som`."""

    @field_validator("position")
    @classmethod
    def _distinct_positions(cls, value: Any) -> Any:
        if isinstance(value, tuple) and len(set(value)) < len(value):
            raise ValueError("a position is given twice")
        return value

    @property
    def extracted(self) -> Literal["mean_difference", "whitened", "logistic"]:
        """The estimator of what is extracted from activations; tuning begins there."""
        return "mean_difference" if self.estimator == "tuned" else self.estimator

    @property
    def by_writer(self) -> bool:
        """Whether modules have edits (U, V) of their own, and no subspace is promised absent."""
        return self.stack in BY_WRITER

    @property
    def of_one_layer(self) -> bool:
        """Whether all k directions are of one layer."""
        return self.stack in ("within_layer", "som")

    @property
    def stored_sets(self) -> frozenset[str]:
        """Sets of which every prompt's activations are read; "differences" for those of pairs."""
        of_stack = {"within_layer": {"differences"}, "som": {"target"}}.get(self.stack, set())
        of_estimator = set() if self.extracted == "mean_difference" else {"target", "contrast"}
        return frozenset(of_stack | of_estimator)

    @property
    def sweeps_positions(self) -> bool:
        """Whether one of several positions is to be chosen by measurement."""
        return self.position == "sweep" or isinstance(self.position, tuple)

    @property
    def positions(self) -> tuple[int | str, ...]:
        """The positions that are named; none where all of the template are to be tried."""
        if self.position == "sweep":
            return ()
        return self.position if isinstance(self.position, tuple) else (self.position,)

    @model_validator(mode="after")
    def _differences_as_they_are(self) -> Self:
        if self.stack == "per_writer" and self.estimator != "tuned":
            raise ValueError(
                "`stack: per_writer` is found by gradients: set `estimator: tuned`, or stack "
                "`layers`"
            )
        if self.stack == "sequential" and self.estimator == "tuned":
            raise ValueError(
                "`stack: sequential` removes directions as they are extracted: leave out "
                "`estimator: tuned`, or stack `layers`"
            )
        if self.stack == "within_layer" and self.projection != "none":
            raise ValueError(
                "`stack: within_layer` takes paired differences as they are: leave "
                "`projection: none`"
            )
        if self.stack == "som" and self.extracted != "mean_difference":
            raise ValueError(
                f"`stack: som` makes directions of its own: leave out `estimator: {self.estimator}`"
            )
        return self
