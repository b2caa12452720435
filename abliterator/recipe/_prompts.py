"""Settings of prompt sets, chats and capture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from abliterator.recipe._section import Positive, Section, as_tuple


class Source(Section):
    """Where prompts come from: a local file, or a Hub dataset at a revision."""

    later_keys: ClassVar = ("groups", "cluster")

    path: Annotated[Path | None, Field(strict=False)] = None
    """Local .txt (one prompt a line) or .jsonl (objects with `prompt`, or a conversation under
    `messages`); relative to the recipe, or to the package's recipes as
    `embedded:demo/target.jsonl`.
    """
    dataset: str | None = None
    """Hub dataset id."""
    revision: str | None = None
    """Commit of the dataset. Default: the build resolves it once and records it."""
    config: str | None = None
    """Configuration of the dataset, where it has several."""
    split: str | None = None
    """Split, slices allowed: `train[:400]`."""
    column: str | None = None
    """Column that holds the prompt. Default: the first there is of `prompt`, `instruction`..."""
    where: dict[str, str | int | bool] = {}
    """Keep only the rows whose columns have these values: `where: {label: safe}`."""
    groups: Annotated[tuple[str, ...] | None, BeforeValidator(as_tuple)] = None
    """Columns by which results are reported in groups: `[category, language]`.

    Default: `category` and `language`, where there are such columns; `[]` for no groups.
    """
    cluster: str | None = None
    """Column whose equal values mark prompts that resemble each other, such as a `form`.

    Intervals and tests of the evaluation then count these clusters, not single prompts.
    """
    limit: Positive | None = None
    """Number of prompts used, counted after duplicates are dropped."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give either `path` or `dataset`")
        if self.path is not None and (self.revision or self.config or self.split):
            raise ValueError(
                "`revision`, `config` and `split` belong to a `dataset`, not to a `path`"
            )
        return self


# AdvBench's requests and Alpaca's instructions as published on the Hub: what the field extracts
# refusal from.
DEFAULT_TARGET = Source(
    dataset="mlabonne/harmful_behaviors",
    revision="01cead01398926d81f7c52bdb790ee8cf77ebba7",
    split="train",
)
DEFAULT_EVALUATION = DEFAULT_TARGET.model_copy(update={"split": "test"})
DEFAULT_NEUTRAL = Source(
    dataset="mlabonne/harmless_alpaca",
    revision="02c6a92cfcf11bb0c387334f8146d149d65b587f",
    split="train[:520]",
)


# Part of the names of files and tensors, and of keys on a command line.
SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]


class Prompts(Section):
    """The prompt sets."""

    later_keys: ClassVar = ("near_duplicates", "protect")

    target: Source = DEFAULT_TARGET
    """Prompts on which the behaviour shows; directions are extracted from their activations."""
    contrast: Source | None = None
    """Prompts as like target as possible, on which the behaviour does not show; their mean
    activation is subtracted.

    Default: neutral.
    """
    neutral: Source = DEFAULT_NEUTRAL
    """Prompts whose answers must stay as they were."""
    evaluation: Source | None = None
    """Held-out prompts on which the behaviour shows. Default: a part of target is held out."""
    neutral_evaluation: Source | None = None
    """Held-out neutral prompts, on which divergence is measured. Default: neutral, or a part of it
    where neutral prompts are used before."""
    over_refusal: Source | None = None
    """Benign prompts that look like target."""
    protect: dict[SetName, Source] = {}
    """Sets of prompts, by any names, whose own directions are removed from the behaviour's.

    The direction of a set is its mean activation less the neutral prompts'. What a ridge regression
    (`directions.ridge`) of each layer's direction on them explains is removed, so that the edit
    leaves them alone: `protect: {code: {path: code.txt}, french: {path: french.txt}}`.
    """
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share held out for evaluation where no evaluation set is given."""
    near_duplicates: Literal["keep", "drop"] = "keep"
    """What happens to prompts that are learned or chosen from and nearly equal one that is measured
    on: in letters, or in all words but one. They are counted, or `drop`ped too.
    """

    @model_validator(mode="before")
    @classmethod
    def _default_evaluation(cls, values: Any) -> Any:
        # the default evaluation set is the test split of the default target set, and fits no other
        if isinstance(values, dict) and "target" not in values:
            return {"evaluation": DEFAULT_EVALUATION, **values}
        return values

    @property
    def sources(self) -> dict[str, Source]:
        """Every set by the name of its key: "target", "protect.code"."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        sources = {name: value for name, value in values.items() if isinstance(value, Source)}
        return sources | {f"protect.{name}": source for name, source in self.protect.items()}

    def with_sources(self, sources: Mapping[str, Source]) -> Self:
        """The section with other sources, by the names of `sources`."""
        changes: dict[str, Any] = {n: s for n, s in sources.items() if "." not in n}
        if self.protect:
            changes["protect"] = {name: sources[f"protect.{name}"] for name in self.protect}
        return self.model_copy(update=changes)


class Chat(Section):
    """How a prompt becomes a conversation, the same for extraction, base and edited."""

    system: str | None = None
    """System prompt. Default: that of the chat template, if it has one."""
    template_kwargs: dict[str, Any] = {}
    """Arguments of the chat template, such as `enable_thinking: false`."""


class Capture(Section):
    """How activations are captured."""

    later_keys: ClassVar = ("share_prefix",)

    padding: Literal["none", "left"] = "none"
    """`none` batches prompts of equal length, with the results of single prompts; `left` pads."""
    max_batch_tokens: Positive = 4096
    """Tokens in one forward pass."""
    share_prefix: bool = False
    """Run the tokens with which all prompts of a set begin, mostly the chat template's, once: less
    to compute, other last bits. Models whose cache cannot be continued run every prompt whole."""

    @model_validator(mode="after")
    def _shared_without_padding(self) -> Self:
        if self.share_prefix and self.padding != "none":
            raise ValueError("`share_prefix` needs `padding: none`")
        return self
