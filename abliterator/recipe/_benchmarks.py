"""Settings of what measures the cost of an edit: divergence and benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)

from abliterator.recipe._section import Positive, Section, as_tuple
from abliterator.recipe._server import PlainSettings, PlainUrl, name_of_variable


class DivergenceSettings(Section):
    """How far the next-token distribution moved on neutral prompts (KL divergence)."""

    limit: Positive = 128
    """Number of neutral prompts compared."""
    tokens: Positive = 32
    """Answer tokens compared for each prompt, along the base's greedy answer."""


Preset = Literal["demo", "quick", "replication", "damage", "conversation"]


class BenchmarkTask(Section):
    """A task with its own settings, which override those of the section."""

    task: str
    """A task name of lm-eval, or a YAML file, relative to the recipe."""
    limit: Positive | None = None
    """Documents of this task."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Few-shot examples before each question."""
    chat_template: bool | None = None
    """Apply the chat template."""


OPENAI_KEY = "OPENAI_API_KEY"

# Set by the run itself: which model is measured, where, and whether its own code may run.
_SET_BY_THE_RUN = {
    *("delta", "gguf_file", "lora_local_path", "peft", "pretrained", "subfolder"),
    *("device", "softmax_dtype", "trust_remote_code"),
}


class BenchmarkEngine(Section):
    """The lm-eval backend that runs the models."""

    later_keys: ClassVar = ("base", "edited", "api_key_env")

    kind: Literal["transformers", "vllm", "server"] = "transformers"
    """`vllm` needs vLLM installed; `server` two completions servers that give log-probabilities."""
    base_url: PlainUrl | None = None
    """Server of the base, up to and with /v1."""
    edited_url: PlainUrl | None = None
    """Server of the edited model."""
    base: str | None = None
    """Name under which the base is served. Default: the first that its server lists."""
    edited: str | None = None
    """Name under which the edited model is served. Default: the first that its server lists."""
    api_key_env: str | None = OPENAI_KEY
    """Name of the environment variable that holds the servers' key, if there is one."""
    options: PlainSettings = {}
    """Further arguments of lm-eval's backend, such as `tensor_parallel_size`.

    Those that would name another model, its device or trust are refused.
    """

    @field_validator("api_key_env")
    @classmethod
    def _name_of_a_variable(cls, value: str | None) -> str | None:
        return name_of_variable(value)

    @model_validator(mode="after")
    def _options_of_the_backend_alone(self) -> Self:
        reserved = sorted(_SET_BY_THE_RUN & self.options.keys())
        if reserved:
            raise ValueError(f"`options` cannot set {', '.join(reserved)}: the run itself does")
        return self

    @model_validator(mode="after")
    def _urls_of_servers(self) -> Self:
        are_given = [self.base_url is not None, self.edited_url is not None]
        if are_given != [self.kind == "server"] * 2:
            raise ValueError("`base_url` and `edited_url` belong to `kind: server`, both of them")
        if self.kind != "server" and (self.base, self.edited) != (None, None):
            raise ValueError("`base` and `edited` belong to `kind: server`")
        return self


Tasks = Annotated[tuple[str | BenchmarkTask, ...], BeforeValidator(as_tuple)]


def _renamed(preset: Any) -> Any:
    if preset == "seed":
        raise ValueError("has a new name: write `replication`")
    return preset


class Benchmarks(Section):
    """What lm-eval measures, base and edited on the same documents; also whole conversations.

    A recipe without the section measures nothing; a section that names no tasks, the five of the
    replication (`preset: replication`), which need the Hub.
    """

    preset: Annotated[Preset | None, BeforeValidator(_renamed)] = None
    """A named list of tasks, before those of `tasks`; `demo` and `conversation` need no Hub."""
    tasks: Tasks = ()
    """Names of lm-eval tasks, groups and tags, `conversation`, or YAML files, relative to the
    recipe.
    """
    limit: Positive | None = 500
    """Documents of each task; null for all."""
    batch_size: Positive = 8
    """Documents scored together, the same for base and edited."""
    chat_template: bool = False
    """Apply the chat template."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Few-shot examples before each question; null for the task's default."""
    engine: BenchmarkEngine = BenchmarkEngine()
    """What runs the models."""
    revisions: dict[str, str] = {}
    """Commits of the tasks' Hub datasets. Default: the build resolves and records them."""

    @model_validator(mode="before")
    @classmethod
    def _the_replications_tasks(cls, values: Any) -> Any:
        if isinstance(values, dict) and not {"preset", "tasks"} & set(values):
            return {**values, "preset": "replication"}
        return values


def without_folder(task: str | dict[str, Any]) -> str | dict[str, Any]:
    """The benchmark task; a YAML file is reduced to its file name."""
    if isinstance(task, dict):
        return {**task, "task": without_folder(task["task"])}
    return Path(task).name if is_task_file(task) else task


def is_task_file(task: str) -> bool:
    """Whether a benchmark task is a YAML file rather than a name of lm-eval."""
    return Path(task).suffix in {".yaml", ".yml"}
