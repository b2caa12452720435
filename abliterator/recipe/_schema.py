"""The types of a recipe, closed and frozen, with one docstring per field."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

Component = Literal["attention", "mlp"]
COMPONENTS: tuple[Component, ...] = ("attention", "mlp")


def _as_tuple(value: object) -> object:
    # yaml has lists only, and strict validation would not take a list for a tuple
    return tuple(value) if isinstance(value, list) else value


Layers = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_as_tuple)]
Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Strength = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of every section: unknown keys and wrong types are errors, nothing is coerced."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        validate_default=True,
    )


class Source(Section):
    """Where prompts come from: a local file, or a Hub dataset at a revision."""

    path: Annotated[Path | None, Field(strict=False)] = None
    """Local .txt (one prompt a line) or .jsonl (objects with `prompt`); relative to the recipe."""
    dataset: str | None = None
    """Hub dataset id."""
    revision: str | None = None
    """Commit of the dataset; left out, the build resolves it once and writes it down."""
    config: str | None = None
    """Configuration of the dataset, where it has several."""
    split: str | None = None
    """Split, slices allowed: `train[:400]`."""
    column: str | None = None
    """Column that holds the prompt. Default: the first there is of `prompt`, `instruction`..."""
    limit: Positive | None = None
    """Use the first so many, after duplicates are dropped."""

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


class Prompts(Section):
    """The prompt sets."""

    target: Source = DEFAULT_TARGET
    """Prompts on which the behaviour shows; directions are extracted from them."""
    contrast: Source | None = None
    """What is subtracted from target, as like it as possible but for the behaviour.

    Default: neutral.
    """
    neutral: Source = DEFAULT_NEUTRAL
    """Prompts whose answers must stay as they were."""
    evaluation: Source | None = None
    """Held-out prompts on which the behaviour shows. Default: a part of target is held out."""
    over_refusal: Source | None = None
    """Benign prompts that look like target."""
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share held out for evaluation where no set of its own is given for it."""

    @model_validator(mode="before")
    @classmethod
    def _default_evaluation(cls, values: Any) -> Any:
        # the default evaluation set is the test split of the default target set, and fits no other
        if isinstance(values, dict) and "target" not in values:
            return {"evaluation": DEFAULT_EVALUATION, **values}
        return values


class Chat(Section):
    """How a prompt becomes a conversation, alike for extraction, base and edited."""

    system: str | None = None
    """System prompt; left out, whatever the chat template itself does."""
    template_kwargs: dict[str, Any] = {}
    """Arguments of the chat template, such as `enable_thinking: false`."""


class Capture(Section):
    """How activations are captured."""

    padding: Literal["none", "left"] = "none"
    """`none` batches prompts of equal length, equal to one by one; `left` pads."""
    max_batch_tokens: Positive = 4096
    """Tokens in one forward pass."""


class DirectionSettings(Section):
    """From moments to directions."""

    estimator: Literal["mean_difference"] = "mean_difference"
    """r = mean(target) - mean(contrast)."""
    position: Annotated[int, Field(le=-1)] = -1
    """Token of the prompt, from the end; -1 is the last one before the answer."""
    projection: Literal["none", "neutral"] = "none"
    """`neutral` removes the component along the neutral mean from every direction."""


class Edit(Section):
    """What is done to the weights."""

    strength: dict[Component, Strength] = {"attention": 1.0, "mlp": 1.0}
    """1 removes, 0 leaves the bytes alone; one number, or one per component (left out: 0)."""
    norm: Literal["none", "column"] = "none"
    """`column` rescales the columns of an edited matrix to their old length."""
    embeddings: bool = False
    """Edit the token embedding too; not possible where the output head is tied to it."""
    biases: bool = True
    """Edit the biases of edited matrices too."""
    rounding: Literal["nearest", "compensated"] = "compensated"
    """`compensated` chooses roundings so that what is stored writes nothing into the subspace."""

    @field_validator("strength", mode="before")
    @classmethod
    def _strength_per_component(cls, value: Any) -> Any:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return dict.fromkeys(COMPONENTS, float(value))
        return value

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if not any(self.strength.values()) and not self.embeddings:
            raise ValueError("every strength is 0: nothing would be edited")
        return self


class Rollouts(Section):
    """Answers of base and edited, greedy."""

    max_new_tokens: Positive = 256
    """Tokens of an answer; fewer than 100 miss refusals that come late."""
    limit: Positive = 100
    """Prompts of each set that are answered."""
    batch_size: Positive = 16
    """Prompts answered together."""


class JudgeSettings(Section):
    """Who judges the answers."""

    kind: Literal["rules"] = "rules"
    """`rules`: phrases and repetition, offline; it says so wherever its numbers appear."""


class DivergenceSettings(Section):
    """How far the edited distribution moved on neutral prompts."""

    limit: Positive = 128
    """Neutral prompts compared."""


class Benchmarks(Section):
    """What lm-eval measures, base and edited on the same documents."""

    tasks: Names = ()
    """Names that lm-eval has, or YAML files of tasks, relative to the recipe."""
    limit: Positive | None = 500
    """Documents of each task; null for all."""
    batch_size: Positive = 8
    """Documents scored together, the same for base and edited."""
    chat_template: bool = False
    """Ask through the chat template."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples before each question; null for the task's own number."""


class Recipe(Section):
    """What is to be made. Everything but `model`, `layers` and `k` has a default."""

    model: Annotated[str, Field(min_length=1)]
    """Hub id, local folder, or `embedded:demo`."""
    layers: Layers | Literal["sweep"]
    """Residual layers (1 .. n_layers) in order of preference; the first k are stacked."""
    k: Positive | Literal["auto"]
    """Rank of the subspace."""
    revision: str | None = None
    """Commit of the model; left out, the build resolves it once and writes it down."""
    trust_remote_code: bool = False
    """Run the model's own code; for a Hub model only at a pinned revision."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of splits and intervals."""
    chat: Chat = Chat()
    prompts: Prompts = Prompts()
    capture: Capture = Capture()
    directions: DirectionSettings = DirectionSettings()
    edit: Edit = Edit()
    rollouts: Rollouts = Rollouts()
    judge: JudgeSettings = JudgeSettings()
    divergence: DivergenceSettings = DivergenceSettings()
    benchmarks: Benchmarks = Benchmarks()

    @field_validator("layers")
    @classmethod
    def _distinct_layers(cls, value: Any) -> Any:
        if value == ():
            raise ValueError("no layer is given")
        if isinstance(value, tuple) and len(set(value)) < len(value):
            raise ValueError("a layer is given twice")
        return value

    @model_validator(mode="after")
    def _enough_layers(self) -> Self:
        if isinstance(self.layers, tuple) and isinstance(self.k, int) and self.k > len(self.layers):
            raise ValueError(f"k is {self.k}, but only {len(self.layers)} layers are given")
        return self

    def published(self) -> dict[str, Any]:
        """The recipe as plain values in which a local path is only its last name.

        What a card and a published folder show: it does not depend on where files lie.
        """
        plain = self.model_dump(mode="json")
        if Path(self.model).is_absolute():
            plain["model"] = Path(self.model).name
        for source in plain["prompts"].values():
            if isinstance(source, dict) and source["path"] is not None:
                source["path"] = Path(source["path"]).name
        tasks = plain["benchmarks"]["tasks"]
        plain["benchmarks"]["tasks"] = [Path(t).name if is_task_file(t) else t for t in tasks]
        return plain

    @property
    def digest(self) -> str:
        """sha256 of the published form as canonical JSON."""
        text = json.dumps(self.published(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def is_task_file(task: str) -> bool:
    """Whether a benchmark task is a YAML file rather than a name that lm-eval has."""
    return Path(task).suffix in {".yaml", ".yml"}
