"""The types of a recipe, closed and frozen, with one docstring per field."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

Component = Literal[
    "attention",
    "mlp",
    "linear_attention",
    "ssm",
    "convolution",
    "expert",
    "shared_expert",
    "per_layer_input",
]
# The two that all others inherit from: whatever mixes tokens, and all else.
COMPONENTS: tuple[Component, ...] = ("attention", "mlp")


def _as_tuple(value: object) -> object:
    # yaml has lists only, and strict validation would not take a list for a tuple
    return tuple(value) if isinstance(value, list) else value


Layers = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_as_tuple)]
Strength = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
Positive = Annotated[int, Field(ge=1)]
# Capitals, as variables are written: a key pasted in its place does not look like this.
VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")


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
    where: dict[str, str | int | bool] = {}
    """Keep only the rows whose columns have these values: `where: {label: safe}`."""
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
    """1 removes, 0 leaves the bytes alone; one number, or one per component.

    `attention` and `mlp` left out are 0. `linear_attention`, `ssm` and `convolution` are as
    `attention`, `expert`, `shared_expert` and `per_layer_input` as `mlp`, unless they are named.
    """
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


class Prices(Section):
    """What a server charges, in dollars for a million tokens."""

    input: Annotated[float, Field(ge=0)]
    """Tokens of the question."""
    output: Annotated[float, Field(ge=0)]
    """Tokens of the reply."""
    cached_input: Annotated[float, Field(ge=0)] | None = None
    """Tokens of the question that the server had in its cache. Default: as `input`."""


class JudgeSettings(Section):
    """Who judges the answers."""

    kind: Literal["rules", "openai"] = "rules"
    """`rules`: phrases and repetition, offline; it says so wherever its numbers appear.

    `openai`: a model behind a server with OpenAI's protocol; all that follows is about it.
    """
    base_url: str = "https://api.deepseek.com"
    """Where the server is; with `/v1` where it wants that."""
    model: Annotated[str, Field(min_length=1)] = "deepseek-flash"
    """Model that judges, as the server names it."""
    api_key_env: str | None = "DEEPSEEK_API_KEY"
    """Name of the environment variable that holds the key; null for a server that wants none."""
    structured: Literal["auto", "json_schema", "json_object", "none"] = "auto"
    """How strictly JSON is asked for; `auto` takes the strictest that the server accepts."""
    parameters: dict[str, Any] = {"temperature": 0}
    """More of the request, as the server takes it: `temperature`, `max_tokens`, `thinking`..."""
    votes: Annotated[int, Field(ge=1, le=9)] = 1
    """Verdicts asked for each answer, an odd number; their median counts."""
    rejudge: Annotated[float, Field(ge=0, le=1)] = 0.15
    """Share of answers judged once more, to tell how often the judge disagrees with itself."""
    retries: Annotated[int, Field(ge=0, le=10)] = 2
    """Times a verdict is asked for again when a reply is none; then the answer is unscored."""
    concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    """Calls in flight."""
    timeout: Annotated[float, Field(gt=0, le=3600)] = 120.0
    """Seconds for one call."""
    time_limit: Annotated[float, Field(gt=0)] = 7200.0
    """Seconds for all judging of one run, waiting included."""
    max_calls: Positive | None = None
    """Calls of one output folder; earlier runs count."""
    max_usd: Annotated[float, Field(gt=0)] | None = None
    """Dollars of one output folder, by `prices`; earlier runs count."""
    prices: Prices | None = None
    """What the server charges."""

    @field_validator("base_url")
    @classmethod
    def _plain_url(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError("must be an http or https URL")
        if parts.username or parts.password or parts.query:
            raise PydanticCustomError(
                "secret", "must hold no credentials: name their variable with `api_key_env`"
            )
        return value.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _name_of_a_variable(cls, value: str | None) -> str | None:
        if value is not None and not VARIABLE.fullmatch(value):
            raise PydanticCustomError(
                "secret", "must be the name of an environment variable in capitals, never a key"
            )
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.votes % 2 == 0:
            raise ValueError("`votes` must be odd, so that there is a median")
        if self.max_usd is not None and self.prices is None:
            raise ValueError("`max_usd` needs `prices`")
        reserved = sorted({"model", "messages", "stream", "response_format"} & set(self.parameters))
        if reserved:
            raise ValueError(f"`parameters` cannot hold `{reserved[0]}`")
        return self

    @model_validator(mode="after")
    def _only_what_applies(self) -> Self:
        if self.kind == "rules":
            fields = type(self).model_fields
            odd = [n for n in self.model_fields_set if getattr(self, n) != fields[n].default]
            if odd:
                raise ValueError(f"`{min(odd)}` belongs to `kind: openai`")
        return self

    @model_serializer(mode="wrap")
    def _only_the_kind_of_rules(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"kind": "rules"} if self.kind == "rules" else plain(self)


class Selection(Section):
    """How layers and k are chosen, for `layers: sweep` and `k: auto`."""

    max_kl: Annotated[float, Field(gt=0)] = 0.1
    """Gate: a candidate moves the answers to neutral prompts by at most so many nats a token."""
    min_induce: float = 0.0
    """Gate: adding a candidate's direction raises the log-odds of a refusal at least so much."""
    skip_last: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Gate: share of the layers, at the end, that are no candidates."""
    prompts: Positive = 32
    """Prompts of each kind on which candidates are scored, and as many held out to be answered."""
    tokens: Positive = 48
    """Tokens of a judged answer."""
    survivors: Positive = 4
    """Candidates whose answers are judged; as many as may be stacked if that is more."""
    stacks: Layers = (1, 2, 3, 5)
    """Sizes that `k: auto` tries; it stops at the first that is no better than the one before."""

    @field_validator("stacks")
    @classmethod
    def _growing(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if value[:1] != (1,) or list(value) != sorted(set(value)):
            raise ValueError("must begin with 1 and grow")
        return value

    def candidates(self, n_layers: int) -> range:
        """The layers that a sweep tries."""
        # 1e-9: 10 layers less a fifth are 8, whatever 10 x (1 - .2) is in binary
        return range(1, max(1, int(n_layers * (1 - self.skip_last) + 1e-9)) + 1)


class DivergenceSettings(Section):
    """How far the edited distribution moved on neutral prompts."""

    limit: Positive = 128
    """Neutral prompts compared."""
    tokens: Positive = 32
    """Answer tokens compared of each prompt, along the base's greedy answer."""


class BenchmarkTask(Section):
    """A task with settings of its own, which go before those of the section."""

    task: str
    """Name that lm-eval has, or YAML file, relative to the recipe."""
    limit: Positive | None = None
    """Documents of this task."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples before each question."""
    chat_template: bool | None = None
    """Ask through the chat template."""


class BenchmarkEngine(Section):
    """What runs the models: a backend of lm-eval's."""

    kind: Literal["transformers", "vllm", "server"] = "transformers"
    """`vllm` needs vLLM installed; `server` two completions servers that give log-probabilities."""
    base_url: str | None = None
    """Server of the base, up to and with /v1."""
    edited_url: str | None = None
    """Server of the edited model."""
    options: dict[str, Any] = {}
    """Further arguments of lm-eval's backend, such as `tensor_parallel_size`."""

    @model_validator(mode="after")
    def _urls_of_servers(self) -> Self:
        given = [self.base_url is not None, self.edited_url is not None]
        if given != [self.kind == "server"] * 2:
            raise ValueError("`base_url` and `edited_url` belong to `kind: server`, both of them")
        return self


Tasks = Annotated[tuple[str | BenchmarkTask, ...], BeforeValidator(_as_tuple)]


class Benchmarks(Section):
    """What lm-eval measures, base and edited on the same documents."""

    preset: Literal["demo", "quick", "seed", "damage"] | None = None
    """A named list of tasks, before those of `tasks`; `demo` needs no Hub."""
    tasks: Tasks = ()
    """Tasks, groups and tags that lm-eval has, by name, or YAML files, relative to the recipe."""
    limit: Positive | None = 500
    """Documents of each task; null for all."""
    batch_size: Positive = 8
    """Documents scored together, the same for base and edited."""
    chat_template: bool = False
    """Ask through the chat template."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples before each question; null for the task's own number."""
    engine: BenchmarkEngine = BenchmarkEngine()
    """What runs the models."""
    revisions: dict[str, str] = {}
    """Commits of the tasks' Hub datasets; left out, the build resolves them and writes them."""


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
    selection: Selection = Selection()
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
        plain["benchmarks"]["tasks"] = [_without_folder(task) for task in tasks]
        return plain

    @property
    def selects(self) -> bool:
        """Whether layers or k are to be chosen by measurement."""
        return self.layers == "sweep" or self.k == "auto"

    @property
    def digest(self) -> str:
        """sha256 of the published form as canonical JSON."""
        text = json.dumps(self.published(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def _without_folder(task: str | dict[str, Any]) -> str | dict[str, Any]:
    """A benchmark task whose YAML file, if it is one, is only its last name."""
    if isinstance(task, dict):
        return {**task, "task": _without_folder(task["task"])}
    return Path(task).name if is_task_file(task) else task


def is_task_file(task: str) -> bool:
    """Whether a benchmark task is a YAML file rather than a name that lm-eval has."""
    return Path(task).suffix in {".yaml", ".yml"}
